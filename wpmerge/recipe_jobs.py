"""A mergekit recipe -> jobs: every parameter resolved for every tensor, as mergekit 0.1.5 would resolve it."""

import hashlib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wpmerge.checkpoint import Checkpoint, TensorInfo
from wpmerge.dtypes import FLOATS, Dtype
from wpmerge.errors import RecipeError
from wpmerge.jobs import Factor, Job, Method, Term
from wpmerge.shards import OutputTensor
from wpmerge.streaming import job_dtype
from wpmerge.yaml_recipe import WITH_BASE, Conditional, Scalar, Setting, Slice, Source, YamlRecipe

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"\.(\d+)\.")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_BEFORE_LAYERS = ("embed", "wte", "wpe")  # read from the first slice; what is in no layer else, from the last
_ALMOST_ZERO = 1e-8  # mergekit does not normalise by a sum of weights below this

Scopes = Sequence[Mapping[str, Setting] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeJobs:
    """What a recipe comes to.

    Attributes:
        jobs: one for each tensor of the output.
        donor: gives configuration and tokenizer.
        dtype: of the output; None keeps the donor's.
        config: entries of the configuration that change.
    """

    jobs: list[Job]
    donor: Checkpoint
    dtype: Dtype | None
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """A tensor of the output: the slice it belongs to, its layer in each source, where that lies in the slice."""

    name: str
    part: Slice
    offset: int | None  # of its layer in the slice; None outside the layers
    depth: float  # from 0, the slice's first layer, to 1, its last

    def name_in(self, source: Source) -> str:
        """The tensor's name in a source."""
        if self.offset is None or source.layer_range is None:
            return self.name
        return _LAYER.sub(f".{source.layer_range[0] + self.offset}.", self.name, count=1)


def recipe_jobs(
    recipe: YamlRecipe,
    checkpoints: Mapping[str, Checkpoint],
    *,
    dtype: Dtype | None,
    where: Path,
    seed: int = 0,
    parity: bool = False,
) -> RecipeJobs:
    """Resolve every parameter of a recipe for every tensor.

    Args:
        recipe: a checked recipe.
        checkpoints: every model that it names, by the name it uses; of one family.
        dtype: overrides the recipe's output dtype.
        where: the recipe's file, for messages.
        seed: of DARE.
        parity: compute task arithmetic in mergekit's own steps and dtype.

    Raises:
        RecipeError: a missing or non-numeric weight, a filter that decides nothing, a layer that does not exist.
    """
    if parity and recipe.merge_method != "task_arithmetic":
        raise RecipeError("parity with mergekit is for task_arithmetic", where=where, got=recipe.merge_method)
    if recipe.dtype not in (None, "float32") and not parity:
        logger.warning("the merge is computed in float32; dtype %s only sets the output's", recipe.dtype)
    donor = checkpoints[recipe.base_model or recipe.parts()[0].sources[0].model]
    wanted = dtype or FLOATS.get(recipe.out_dtype or recipe.dtype or "")
    reader = _Reader(recipe, where, seed, parity=parity)
    jobs = []
    for target, info in _targets(recipe, donor, where):
        output = OutputTensor(name=target.name, shape=info.shape, dtype=job_dtype(info.dtype, wanted))
        jobs.append(reader.job(target, output, checkpoints))
    reader.check_all_filters_hit()
    config = _changed_config(recipe, donor) if recipe.slices else {}
    return RecipeJobs(jobs=jobs, donor=donor, dtype=wanted, config=config)


def _targets(recipe: YamlRecipe, donor: Checkpoint, where: Path) -> Iterator[tuple[_Target, TensorInfo]]:
    """Every tensor of the output, and the shape and dtype that it has in the donor."""
    parts = recipe.parts()
    layers: dict[int, list[str]] = {}
    for name, info in donor.tensors.items():
        if layer := _LAYER.search(name):
            layers.setdefault(int(layer[1]), []).append(name)
        else:
            part = parts[0] if any(word in name for word in _BEFORE_LAYERS) else parts[-1]
            yield _Target(name=name, part=part, offset=None, depth=0.0), info
    made = 0
    for part in parts:
        first, end = part.sources[0].layer_range or (0, _layer_count(donor, layers))
        for source in part.sources:
            if source.layer_range and source.layer_range[1] > len(layers):
                raise RecipeError(
                    f"a slice asks for layers that {source.model} does not have",
                    where=where,
                    got=list(source.layer_range),
                    expected=f"at most {len(layers)}",
                )
        for number in sorted(layers):  # not range(first, end): a configuration may state any number
            if not first <= number < end:
                continue
            offset = number - first
            depth = offset / (end - first - 1) if end - first > 1 else 1.0
            for name in layers[number]:
                target = _LAYER.sub(f".{made + offset}.", name, count=1)
                yield _Target(name=target, part=part, offset=offset, depth=depth), donor.tensors[name]
        made += end - first


def _layer_count(donor: Checkpoint, layers: Mapping[int, list[str]]) -> int:
    stated = next((donor.config[key] for key in _LAYER_COUNTS if isinstance(donor.config.get(key), int)), 0)
    return int(max(stated, max(layers, default=-1) + 1))


class _Reader:
    """Resolves parameters, and remembers which filters decided something."""

    def __init__(self, recipe: YamlRecipe, where: Path, seed: int, *, parity: bool) -> None:
        self._recipe, self._where, self._seed, self._parity = recipe, where, seed, parity
        self._hits: set[int] = set()

    def job(self, target: _Target, output: OutputTensor, checkpoints: Mapping[str, Checkpoint]) -> Job:
        """How a tensor of the output is made."""
        recipe, part = self._recipe, target.part
        base_name = part.base_model or recipe.base_model
        sources = [
            source for source in part.sources if recipe.merge_method not in WITH_BASE or source.model != base_name
        ]
        unlisted = Source(model=base_name) if base_name else None
        base = next((source for source in part.sources if source.model == base_name), unlisted)
        if base is not None and base.parameters and recipe.merge_method in WITH_BASE:
            raise RecipeError("the base's own parameters have no effect", where=f"{self._where}, {base.model}")
        donor = base or part.sources[0]
        original = (checkpoints[donor.model], target.name_in(donor))
        if not output.dtype.is_floating_point:
            return Job(output=output, base=original, terms=())
        if recipe.merge_method == "passthrough":
            return self._passthrough(target, output, sources[0], checkpoints)
        numbers = self._weights(target, sources)
        self._check_tied(target, sources, checkpoints, numbers)
        return self._weighted(target, output, sources, checkpoints, numbers, original)

    def _passthrough(
        self, target: _Target, output: OutputTensor, source: Source, checkpoints: Mapping[str, Checkpoint]
    ) -> Job:
        checkpoint, name = checkpoints[source.model], target.name_in(source)
        scale = self._resolve("scale", self._scopes(target, source), name, target.depth)
        if scale is None:
            return Job(output=output, base=(checkpoint, name), terms=())
        number = self._number("scale", scale, name)
        term = Term(checkpoint=checkpoint, tensor=name, coefficient=Factor.of(number))
        return Job(output=output, base=None, terms=(term,), method="linear")

    def _weighted(
        self,
        target: _Target,
        output: OutputTensor,
        sources: Sequence[Source],
        checkpoints: Mapping[str, Checkpoint],
        numbers: Sequence[float],
        base: tuple[Checkpoint, str],
    ) -> Job:
        method: Method = self._recipe.merge_method  # type: ignore[assignment]  # checked when it was read
        elects = method in ("ties", "dare_ties")
        normalize = self._flag("normalize", target, default=method in ("linear", "ties"))
        rescale = self._flag("rescale", target, default=method.startswith("dare"))
        if rescale and method == "ties":
            raise RecipeError("rescale is not done for ties", where=self._where, mend="use --engine mergekit")
        scale = 1.0
        if method in WITH_BASE:
            scale = self._number(
                "lambda",
                self._resolve("lambda", self._scopes(target), target.name, target.depth, default=1.0),
                target.name,
            )
        total = math.fsum(numbers) if normalize and not elects else 1.0
        if abs(total) < _ALMOST_ZERO:
            if method == "linear":
                raise RecipeError("the weights of a linear merge sum to zero", where=f"{self._where}, {target.name}")
            total = 1.0
        terms = []
        for i, (source, number) in enumerate(zip(sources, numbers, strict=True)):
            factor = number if elects else number * scale / total
            name = target.name_in(source)
            terms.append(
                Term(
                    checkpoint=checkpoints[source.model],
                    tensor=name,
                    coefficient=Factor.of(factor),
                    density=self._density(target, source, name) if method not in ("task_arithmetic", "linear") else 1.0,
                    seed=tensor_seed(self._seed, i, target.name) if method.startswith("dare") else 0,
                )
            )
        apart = elects or self._parity  # else they are in the coefficients
        return Job(
            output=output,
            base=base if method in WITH_BASE else None,
            terms=tuple(terms),
            method=method,
            rescale=rescale,
            parity=self._parity_dtype(base, terms, target.name) if self._parity else None,
            weights=tuple(numbers) if self._parity else (),
            normalize=normalize and apart,
            scale=scale if apart else 1.0,
        )

    def _parity_dtype(self, base: tuple[Checkpoint, str], terms: Sequence[Term], name: str) -> Dtype:
        """The dtype that mergekit computes in: the recipe's, or that of the tensors."""
        if self._recipe.dtype is not None:
            return FLOATS[self._recipe.dtype]
        dtypes = {base[0].tensors[base[1]].dtype, *(term.checkpoint.tensors[term.tensor].dtype for term in terms)}
        if len(dtypes) > 1:
            raise RecipeError(
                f"parity over mixed dtypes of {name}", where=self._where, mend="state dtype in the recipe"
            )
        return dtypes.pop()

    def _weights(self, target: _Target, sources: Sequence[Source]) -> list[float]:
        found = []
        for source in sources:
            name = target.name_in(source)
            weight = self._resolve("weight", self._scopes(target, source), name, target.depth)
            found.append(self._number("weight", weight, f"{source.model}, {name}"))
        return found

    def _check_tied(
        self,
        target: _Target,
        sources: Sequence[Source],
        checkpoints: Mapping[str, Checkpoint],
        numbers: Sequence[float],
    ) -> None:
        """A head stored beside the embedding it is tied to must be weighed like it: only one of them is merged."""
        aliases = {key for model in checkpoints.values() for key, kept in model.tied.items() if kept == target.name}
        for alias in sorted(aliases):
            if self._weights(replace(target, name=alias), sources) != list(numbers):
                raise RecipeError(
                    f"{alias} is tied to {target.name}, but the recipe weighs them differently", where=self._where
                )

    def _density(self, target: _Target, source: Source, name: str) -> float:
        value = self._resolve("density", self._scopes(target, source), name, target.depth, default=1.0)
        density = self._number("density", value, name)
        if not 0 <= density <= 1:
            raise RecipeError(
                "a density lies outside [0, 1]", where=f"{self._where}, {source.model}, {name}", got=density
            )
        return density

    def _flag(self, parameter: str, target: _Target, *, default: bool) -> bool:
        value = self._resolve(parameter, self._scopes(target), target.name, target.depth, default=default)
        if value not in (True, False):
            raise RecipeError(f"{parameter} is true or false", where=f"{self._where}, {target.name}", got=value)
        return bool(value)

    def _scopes(self, target: _Target, source: Source | None = None) -> Scopes:
        """Where a parameter is looked for, the nearest first."""
        own = [source.parameters] if source is not None else []
        return [*own, target.part.parameters, self._recipe.parameters]

    def _resolve(self, parameter: str, scopes: Scopes, name: str, t: float, default: Any = None) -> Any:
        for scope in scopes:
            if scope is not None and parameter in scope:
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
        parts = self._recipe.parts()
        scopes = [self._recipe.parameters, *(part.parameters for part in parts)]
        scopes += [source.parameters for part in parts for source in part.sources]
        for scope in scopes:
            for parameter, setting in (scope or {}).items():
                for entry in setting if isinstance(setting, list) else [setting]:
                    if not isinstance(entry, Conditional) or entry.filter is None or id(entry) in self._hits:
                        continue
                    raise RecipeError(
                        f"a filter of {parameter} decides nothing",
                        where=self._where,
                        got=entry.filter,
                        expected="part of a tensor's name that no filter before it matches",
                    )


def tensor_seed(seed: int, expert: int, name: str) -> int:
    """DARE's seed for one tensor of one expert, by the expert's place in the recipe: paths may change, it does not."""
    digest = hashlib.sha256(f"{seed}/{expert}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _changed_config(recipe: YamlRecipe, donor: Checkpoint) -> dict[str, Any]:
    """The number of layers, and the lists that have an entry for each."""
    config = donor.config
    key = next((key for key in _LAYER_COUNTS if isinstance(config.get(key), int)), _LAYER_COUNTS[0])
    order = [layer for part in recipe.parts() for layer in range(*(part.sources[0].layer_range or (0, 0)))]
    changed: dict[str, Any] = {key: len(order)}
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == config.get(key):
        changed["layer_types"] = [kinds[layer] for layer in order]
    return changed
