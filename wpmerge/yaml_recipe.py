"""mergekit's YAML recipes, read by our own schema: what a recipe says is done, refused by name, or an error.

Reading follows mergekit 0.1.5 where it says what a recipe means (filters match by substring, the first hit wins;
gradients run over the layers, and their first value holds outside of them) and is strict where mergekit is silent.
"""

import logging
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wpmerge.dtypes import FLOATS
from wpmerge.errors import RecipeError, describe

logger = logging.getLogger(__name__)

_ARITHMETIC = {"lambda", "normalize", "int8_mask"}
PER_MODEL = {
    "task_arithmetic": {"weight"},
    "linear": {"weight"},
    "ties": {"weight", "density"},
    "dare_linear": {"weight", "density"},
    "dare_ties": {"weight", "density"},
    "passthrough": {"scale"},
}
SHARED = {
    "task_arithmetic": _ARITHMETIC,
    "linear": {"normalize", "int8_mask"},
    "ties": _ARITHMETIC | {"rescale"},
    "dare_linear": _ARITHMETIC | {"rescale"},
    "dare_ties": _ARITHMETIC | {"rescale"},
    "passthrough": set(),
}
WITH_BASE = ("task_arithmetic", "ties", "dare_linear", "dare_ties")

Scalar = bool | int | float | str


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Conditional(_Strict):
    """A value for the tensors whose name contains ``filter``; for all without it."""

    value: Scalar | list[Scalar]
    filter: str | None = None


Setting = Scalar | list[Scalar] | list[Conditional] | Conditional


class Source(_Strict):
    """A model, or a range of its layers (the first, and the one after the last), with its parameters."""

    model: str
    layer_range: tuple[int, int] | None = None
    parameters: dict[str, Setting] | None = None


class Slice(_Strict):
    """Layers of the output, each made from one layer of every source."""

    sources: list[Source] = Field(min_length=1)
    base_model: str | None = None
    parameters: dict[str, Setting] | None = None


class YamlRecipe(_Strict):
    """The part of mergekit's recipe format that is merged here; everything else is refused by name."""

    models: list[Source] | None = Field(default=None, min_length=1)
    slices: list[Slice] | None = Field(default=None, min_length=1)
    merge_method: str
    base_model: str | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    parameters: dict[str, Setting] | None = None

    def parts(self) -> list[Slice]:
        """The recipe as slices; one without layer ranges where it lists whole models."""
        return self.slices if self.slices is not None else [Slice(sources=self.models or [])]

    def model_names(self) -> list[str]:
        """Every model once, by the name that the recipe uses; the base first."""
        names = [self.base_model] if self.base_model else []
        for part in self.parts():
            names += [part.base_model] if part.base_model else []
            names += [source.model for source in part.sources]
        return list(dict.fromkeys(names))


_NOT_YET = ("modules", "tokenizer", "chat_template")
_MEND = "use mergekit itself for this recipe (--engine mergekit)"


def read_mapping(path: Path) -> dict[str, Any]:
    """A recipe's file as it stands: a mapping in which no key is given twice.

    Raises:
        RecipeError: no such file, not YAML, or no mapping.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError("a recipe cannot be read", where=path, got=str(error).replace("\n", " ")) from None
    if not isinstance(raw, dict):
        raise RecipeError("a recipe is a mapping of keys", where=path, got=type(raw).__name__)
    return raw


def read_yaml_recipe(path: Path) -> YamlRecipe:
    """Read and check a recipe file.

    Raises:
        RecipeError: not a recipe, an unknown key, or something that is not done here; names it.
    """
    raw = read_mapping(path)
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
    if (recipe.models is None) == (recipe.slices is None):
        raise RecipeError("a recipe has either models or slices", where=path)
    for kind, name in (("dtype", recipe.dtype), ("out_dtype", recipe.out_dtype)):
        if name is not None and name not in FLOATS:
            raise RecipeError(f"{kind} {name} is not supported", where=path, expected=", ".join(FLOATS))
    if recipe.tokenizer_source not in (None, "base"):
        raise RecipeError(
            f"tokenizer_source {recipe.tokenizer_source} is not supported", where=path, expected="base", mend=_MEND
        )
    for number, part in enumerate(recipe.parts()):
        _check_slice(recipe, part, f"{path}, slice {number}" if recipe.slices else path)
    _check_parameters(recipe, path)
    if "int8_mask" in (recipe.parameters or {}):
        logger.warning("int8_mask is ignored: masks are never stored here")


def _check_slice(recipe: YamlRecipe, part: Slice, where: object) -> None:
    method, base = recipe.merge_method, part.base_model or recipe.base_model
    names = [source.model for source in part.sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError("a recipe lists a model twice", where=where, got=twice[0])
    if method in WITH_BASE and base is None:
        raise RecipeError(f"{method} needs a base_model", where=where)
    if method == "passthrough" and len(names) != 1:
        raise RecipeError("passthrough takes one model", where=where, got=len(names))
    if not recipe.slices:
        if any(source.layer_range for source in part.sources):
            raise RecipeError("a layer_range belongs to slices", where=where)
        return
    ranges = [source.layer_range for source in part.sources]
    if any(found is None or not 0 <= found[0] < found[1] for found in ranges):
        raise RecipeError("a source has no valid layer_range", where=where, got=ranges, expected="[first, after last]")
    if len({found[1] - found[0] for found in ranges if found}) > 1:
        raise RecipeError("the sources of a slice have different numbers of layers", where=where, got=ranges)
    if base is not None and base not in names:
        raise RecipeError("the base_model is not among the sources of a slice", where=where, got=names, expected=base)


def _check_parameters(recipe: YamlRecipe, path: Path) -> None:
    method = recipe.merge_method
    scopes: list[tuple[str, dict[str, Setting] | None, set[str]]] = [
        ("parameters", recipe.parameters, PER_MODEL[method] | SHARED[method])
    ]
    for part in recipe.parts():
        scopes.append(("slice", part.parameters, PER_MODEL[method] | SHARED[method]))
        scopes += [(f"model {source.model}", source.parameters, PER_MODEL[method]) for source in part.sources]
    for scope, parameters, allowed in scopes:
        if unknown := sorted(set(parameters or {}) - allowed):
            raise RecipeError(
                f"{method} has no parameter {unknown[0]} here", where=f"{path}, {scope}", expected=sorted(allowed)
            )


class UniqueKeys(yaml.SafeLoader):
    """YAML, but a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)
