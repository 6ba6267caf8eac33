"""mergekit's YAML recipes, read by our own schema: what a recipe says is done, refused by name, or an error.

Reading follows mergekit 0.1.5 where it says what a recipe means (filters match by substring, the first hit wins;
gradients run over the layers, and their first value holds outside of them) and is strict where mergekit is silent.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wpmerge.checkpoint import Checkpoint
from wpmerge.errors import RecipeError
from wpmerge.plan import Coefficient, describe
from wpmerge.shards import OutputTensor
from wpmerge.streaming import Job, Term, job_dtype

logger = logging.getLogger(__name__)

Method = Literal["task_arithmetic", "linear"]
PER_MODEL = {"task_arithmetic": {"weight"}, "linear": {"weight"}}
SHARED = {"task_arithmetic": {"lambda", "normalize", "int8_mask"}, "linear": {"normalize", "int8_mask"}}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LAYER = re.compile(r"\.(\d+)\.")
_ALMOST_ZERO = 1e-8  # mergekit does not normalise by a sum of weights below this

Scalar = bool | int | float | str


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Conditional(_Strict):
    """A value for the tensors whose name contains ``filter``; for all without it."""

    value: Scalar | list[Scalar]
    filter: str | None = None


Setting = Scalar | list[Scalar] | list[Conditional] | Conditional


class _Model(_Strict):
    model: str
    parameters: dict[str, Setting] = Field(default_factory=dict)


class YamlRecipe(_Strict):
    """The part of mergekit's recipe format that is merged here; everything else is refused by name."""

    models: list[_Model] = Field(min_length=1)
    merge_method: str
    base_model: str | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    parameters: dict[str, Setting] = Field(default_factory=dict)


_NOT_YET = ("slices", "modules", "tokenizer", "chat_template")
_MEND = "use mergekit-yaml for this recipe"


def read_yaml_recipe(path: Path) -> YamlRecipe:
    """Read and check a recipe file.

    Raises:
        RecipeError: not a recipe, an unknown key, or something that is not done here; names it.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError("a recipe cannot be read", where=path, got=str(error).replace("\n", " ")) from None
    if not isinstance(raw, dict):
        raise RecipeError("a recipe is a mapping of keys", where=path, got=type(raw).__name__)
    if refused := [key for key in _NOT_YET if key in raw]:
        raise RecipeError(f"{refused[0]} in a recipe are not supported", where=path, mend=_MEND)
    try:
        recipe = YamlRecipe.model_validate(raw)
    except (ValidationError, RecursionError) as error:
        got = describe(error) if isinstance(error, ValidationError) else error
        raise RecipeError("a recipe is malformed", where=path, got=got) from None
    _check_support(recipe, path)
    return recipe


def _check_support(recipe: YamlRecipe, path: Path) -> None:
    method = recipe.merge_method
    if method not in PER_MODEL:
        raise RecipeError(
            f"merge_method {method} is not supported", where=path, expected=" or ".join(PER_MODEL), mend=_MEND
        )
    if method == "task_arithmetic" and recipe.base_model is None:
        raise RecipeError(f"{method} needs a base_model", where=path)
    for kind, name in (("dtype", recipe.dtype), ("out_dtype", recipe.out_dtype)):
        if name is not None and name not in DTYPES:
            raise RecipeError(f"{kind} {name} is not supported", where=path, expected=", ".join(DTYPES))
    if recipe.tokenizer_source not in (None, "base"):
        raise RecipeError(
            f"tokenizer_source {recipe.tokenizer_source} is not supported", where=path, expected="base", mend=_MEND
        )
    names = [model.model for model in recipe.models]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError("a recipe lists a model twice", where=path, got=twice[0])
    for scope, parameters, allowed in [
        ("parameters", recipe.parameters, PER_MODEL[method] | SHARED[method]),
        *((f"model {model.model}", model.parameters, PER_MODEL[method]) for model in recipe.models),
    ]:
        if unknown := sorted(set(parameters) - allowed):
            raise RecipeError(
                f"{method} has no parameter {unknown[0]} here", where=f"{path}, {scope}", expected=sorted(allowed)
            )
    if "int8_mask" in recipe.parameters:
        logger.warning("int8_mask is ignored: masks are never stored here")
    if recipe.dtype not in (None, "float32"):
        logger.warning("the merge is computed in float32; dtype %s only sets the output's", recipe.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeJobs:
    """What a recipe comes to: jobs, the checkpoint that gives configuration and tokenizer, the output dtype."""

    jobs: list[Job]
    donor: Checkpoint
    dtype: torch.dtype | None


def recipe_jobs(
    recipe: YamlRecipe, checkpoints: Mapping[str, Checkpoint], *, dtype: torch.dtype | None, where: Path
) -> RecipeJobs:
    """Resolve every parameter of a recipe for every tensor.

    Args:
        recipe: a checked recipe.
        checkpoints: every model that it names, by the name it uses; of one family.
        dtype: overrides the recipe's output dtype.
        where: the recipe's file, for messages.

    Raises:
        RecipeError: a missing or non-numeric weight, a filter that decides nothing.
    """
    reader = _Reader(recipe, where)
    base_name = recipe.base_model
    donor = checkpoints[base_name or recipe.models[0].model]
    wanted = dtype or DTYPES.get(recipe.out_dtype or recipe.dtype or "")
    jobs = []
    for name, info in donor.tensors.items():
        output = OutputTensor(name=name, shape=info.shape, dtype=job_dtype(info.dtype, wanted))
        if not info.dtype.is_floating_point:
            jobs.append(Job(output=output, base=(donor, name), terms=()))
            continue
        weights = reader.weights(name, donor)
        for alias in sorted(
            {key for model in checkpoints.values() for key, kept in model.tied.items() if kept == name}
        ):
            if reader.weights(alias, donor) != weights:
                raise RecipeError(f"{alias} is tied to {name}, but the recipe weighs them differently", where=where)
        terms = tuple(
            Term(
                checkpoint=checkpoints[model],
                tensor=name,
                coefficient=Coefficient(values=torch.tensor(weight, dtype=torch.float32)),
            )
            for model, weight in weights.items()
        )
        base = (donor, name) if recipe.merge_method == "task_arithmetic" else None
        jobs.append(Job(output=output, base=base, terms=terms))
    reader.check_all_filters_hit()
    return RecipeJobs(jobs=jobs, donor=donor, dtype=wanted)


class _Reader:
    """Resolves parameters, and remembers which filters decided something."""

    def __init__(self, recipe: YamlRecipe, where: Path) -> None:
        self._recipe, self._where = recipe, where
        self._hits: set[int] = set()

    def weights(self, name: str, donor: Checkpoint) -> dict[str, float]:
        """The factor of each model for a tensor, normalisation and lambda included."""
        recipe, t = self._recipe, _depth(name, donor)
        task = recipe.merge_method == "task_arithmetic"
        found = {}
        for model in recipe.models:
            if task and model.model == recipe.base_model:
                if model.parameters:
                    raise RecipeError("the base's own weight has no effect", where=f"{self._where}, {model.model}")
                continue
            weight = self._resolve("weight", (model.parameters, recipe.parameters), name, t)
            found[model.model] = self._number("weight", weight, f"{model.model}, {name}")
        scale = 1.0
        if task:
            scale = self._number("lambda", self._resolve("lambda", (recipe.parameters,), name, t, default=1.0), name)
        normalize = self._resolve("normalize", (recipe.parameters,), name, t, default=not task)
        if normalize not in (True, False):
            raise RecipeError("normalize is true or false", where=f"{self._where}, {name}", got=normalize)
        total = math.fsum(found.values()) if normalize else 1.0
        if abs(total) < _ALMOST_ZERO:
            if not task:
                raise RecipeError("the weights of a linear merge sum to zero", where=f"{self._where}, {name}")
            total = 1.0
        return {model: weight * scale / total for model, weight in found.items()}

    def _resolve(
        self, parameter: str, scopes: tuple[dict[str, Setting], ...], name: str, t: float, default: Any = None
    ) -> Any:
        for scope in scopes:
            if parameter in scope:
                value = self._evaluate(scope[parameter], name, t)
                if value is not None:
                    return value
        return default

    def _evaluate(self, setting: Any, name: str, t: float) -> Any:
        if isinstance(setting, Conditional):
            setting = [setting]
        if not isinstance(setting, list):
            return setting
        if setting and isinstance(setting[0], Conditional):
            for entry in setting:
                if entry.filter is None or entry.filter == "*" or entry.filter in name:
                    self._hits.add(id(entry))
                    return self._evaluate(entry.value, name, t)
            return None
        return self._gradient(setting, t)

    def _gradient(self, values: list[Scalar], t: float) -> Any:
        """Linear interpolation between values spread evenly over the layers; the first for everything else."""
        if not values:
            return None
        if any(isinstance(value, bool) for value in values):
            return values[int(t * (len(values) - 1))]
        numbers = [self._number("gradient", value, "") for value in values]
        place = t * (len(numbers) - 1)
        low = int(place)
        high = min(len(numbers) - 1, low + 1)
        return (1 - (place - low)) * numbers[low] + (place - low) * numbers[high]

    def _number(self, parameter: str, value: Any, what: str) -> float:
        try:
            number = float(value) if value is not None and not isinstance(value, bool) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RecipeError(
                f"{parameter} is no finite number", where=f"{self._where}, {what}", got=value, expected="a number"
            )
        return number

    def check_all_filters_hit(self) -> None:
        """Refuse filters that decided nothing for any tensor."""
        for scope in [self._recipe.parameters, *(model.parameters for model in self._recipe.models)]:
            for parameter, setting in scope.items():
                for entry in setting if isinstance(setting, list) else [setting]:
                    if not isinstance(entry, Conditional) or entry.filter is None or id(entry) in self._hits:
                        continue
                    raise RecipeError(
                        f"a filter of {parameter} decides nothing",
                        where=self._where,
                        got=entry.filter,
                        expected="part of a tensor's name that no filter before it matches",
                    )


def _depth(name: str, donor: Checkpoint) -> float:
    """Where a tensor's layer lies between the first (0) and the last (1); 0 outside the layers, 1 in a lone one."""
    layers = donor.config.get("num_hidden_layers", donor.config.get("n_layer"))
    layer = _LAYER.search(name)
    if layer is None or not isinstance(layers, int):
        return 0.0
    return int(layer[1]) / (layers - 1) if layers > 1 else 1.0


class _UniqueKeys(yaml.SafeLoader):
    """YAML, but a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)
