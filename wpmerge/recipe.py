"""Plan -> mergekit recipe: one number per tensor and expert, written so that mergekit reads what was meant.

What mergekit 0.1.5 does silently, and this module therefore checks: a filter matches every tensor whose name contains
it, the first hit wins, unknown keys and filters without a hit are ignored.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from wpmerge.checkpoint import Checkpoint
from wpmerge.dtypes import Dtype
from wpmerge.errors import RecipeError
from wpmerge.plan import BASE, Coefficient, Plan
from wpmerge.tensorfile import check_finite

logger = logging.getLogger(__name__)

BLOCK_ELEMENTS = 2**20
_EXACT = "One number per tensor and expert: this recipe reproduces the merge exactly."
_FITTED = (
    "The merge has finer coefficients than a recipe can hold. Each number here is the least-squares one,\n"
    "# <diag(c) D, D> / <D, D> with D = expert - base; {count} of {total} are such fits, and mergekit's result differs."
)
_DARE = (
    "DARE drops at random: mergekit draws other entries, and matches the L1 norm where wpmerge divides by the density."
)
_ADAPTERS = (
    "One number per tensor and expert. Experts after '+' are LoRA adapters: mergekit first rounds base + adapter to\n"
    "# the base's dtype, wpmerge does not, so that the results differ by that rounding."
)


def recipe_text(plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> str:
    """The plan as a mergekit YAML recipe.

    Args:
        plan: any plan; scalars are written as they are, vectors as their least-squares number.
        checkpoints: the base under ``base`` and each expert under its name; weights are read only for vectors.

    Raises:
        RecipeError: a number would not reach its tensor through mergekit's filters.
    """
    weights, fitted = {}, 0
    for expert, coefficients in plan.coefficients.items():
        numbers: dict[str, float] = {}
        for name, coefficient in coefficients.items():
            exact = single_number(coefficient)
            fitted += exact is None
            numbers[name] = least_squares(coefficient, checkpoints, expert, name) if exact is None else exact
        weights[expert] = weight_setting(with_tied_names(numbers, checkpoints.values()))
    total = sum(len(coefficients) for coefficients in plan.coefficients.values())
    notes = [f"Written by wpmerge; rule {plan.rule}, granularity {plan.granularity}."]
    adapters = any(model.adapter for model in plan.experts.values())
    if fitted:
        notes.append(_FITTED.format(count=fitted, total=total))
    if adapters or not fitted:
        notes.append(_ADAPTERS if adapters else _EXACT)
    if plan.operator.method.startswith("dare"):
        notes.append(_DARE)
    density = {} if plan.operator.method == "task_arithmetic" else {"density": plan.operator.density}
    document = {
        "models": [
            {"model": model_reference(plan, expert), "parameters": {"weight": weights[expert]} | density}
            for expert in plan.experts
        ],
        "merge_method": plan.operator.method,
        "base_model": plan.base.source,
        "parameters": {"normalize": plan.operator.normalize},
        "dtype": "float32",
        "out_dtype": main_dtype(checkpoints[BASE]),
    }
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=200)
    return "".join(f"# {note}\n" for note in notes) + text


def weight_setting(numbers: Mapping[str, float]) -> list[dict[str, Any]]:
    """Numbers per tensor as mergekit's list of filters: exceptions first, then the most frequent number for the rest.

    Longer names come first, so that a name inside another's never takes its number.

    Raises:
        RecipeError: mergekit's rule would give a tensor another number than its own.
    """
    rest, _ = Counter(numbers.values()).most_common(1)[0]
    listed = {name for name, number in numbers.items() if number != rest}
    while True:
        names = sorted(listed, key=lambda name: (-len(name), name))
        setting: list[dict[str, Any]] = [{"filter": name, "value": numbers[name]} for name in names]
        setting.append({"value": rest})
        missed = {name for name, number in numbers.items() if resolve_filters(setting, name) != number}
        if not missed:
            return setting
        if missed <= listed:
            raise RecipeError("a recipe's filters cannot tell these tensors apart", got=sorted(missed)[:2])
        listed |= missed


def resolve_filters(setting: list[dict[str, Any]], name: str) -> Any:
    """The value that mergekit takes for a tensor: that of the first filter contained in its name."""
    for entry in setting:
        wanted = entry.get("filter")
        if wanted is None or wanted == "*" or wanted in name:
            return entry["value"]
    return None


def least_squares(coefficient: Coefficient, checkpoints: Mapping[str, Checkpoint], expert: str, name: str) -> float:
    """The one number nearest to a vector coefficient: <diag(c) D, D> / <D, D>, D = expert - base.

    The mean of the vector where the expert does not differ from the base.
    """
    import torch

    base, other = checkpoints[BASE], checkpoints[expert]
    shape, axis = base.tensors[name].shape, coefficient.axis
    assert axis is not None
    stride = int(torch.tensor(shape[axis + 1 :]).prod())
    energy = torch.zeros(shape[axis], dtype=torch.float64)  # of D along the axis
    for start in range(0, base.tensors[name].numel, BLOCK_ELEMENTS):
        stop = min(start + BLOCK_ELEMENTS, base.tensors[name].numel)
        pair = [checkpoint.load_elements(name, start, stop).double() for checkpoint in (other, base)]
        check_finite(pair[0], where=other.where(name), start=start)
        check_finite(pair[1], where=base.where(name), start=start)
        positions = torch.arange(start, stop) // stride % shape[axis]
        energy.index_add_(0, positions, (pair[0] - pair[1]).square_())
    values = coefficient.values.double()
    total = float(energy.sum())
    return float(values @ energy) / total if total else float(values.mean())


def main_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of most of a checkpoint's elements, by torch's name."""
    elements: Counter[Dtype] = Counter()
    for info in checkpoint.tensors.values():
        elements[info.dtype] += info.numel if info.dtype.is_floating_point else 0
    return str(elements.most_common(1)[0][0])


def check_with_mergekit(text: str, plan: Plan, base: Checkpoint) -> None:
    """Let mergekit's own configuration class and filter rule read a recipe, and compare with what was meant.

    Imports mergekit, which takes several seconds.

    Raises:
        RecipeError: mergekit refuses the recipe, does not know a tensor of the base, or reads another number.
    """
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration, evaluate_setting
    from mergekit.options import MergeOptions

    document = yaml.safe_load(text)
    try:
        configuration = MergeConfiguration.model_validate(document)
    except (ValueError, RuntimeError) as error:
        raise RecipeError("mergekit refuses the recipe", got=error) from None
    if dropped := set(document) - set(type(configuration).model_fields):
        raise RecipeError("mergekit would ignore part of the recipe", got=sorted(dropped))
    known = _names_in_mergekit(get_architecture_info(configuration, MergeOptions()), base)
    if unknown := sorted(set(base.tensors) - set(known)):
        raise RecipeError("mergekit would leave out a tensor of the base", where=unknown[0], got=len(unknown))
    for expert, model in zip(plan.experts, configuration.models, strict=True):
        for name, coefficient in plan.coefficients[expert].items():
            exact = single_number(coefficient)
            value = evaluate_setting(known[name], model.parameters["weight"], 0, validate=float)
            if exact is not None and value != exact:
                raise RecipeError(f"mergekit would read another number for {name}", got=value, expected=exact)


def _names_in_mergekit(architecture: Any, base: Checkpoint) -> dict[str, str]:
    """A tensor's name here -> the name that mergekit matches filters against."""
    from mergekit.architecture.base import ConfiguredModelArchitecture
    from mergekit.common import ModelReference

    config = ModelReference.model_validate(base.source).config()
    configured = ConfiguredModelArchitecture(info=architecture, config=config)
    names: dict[str, str] = {}
    for weight in configured.all_weights():
        for alias in [*(weight.tied_names or []), *(weight.aliases or []), weight.name]:
            names.setdefault(alias, weight.name)
            if alias == weight.name:
                names[alias] = weight.name
    return names


def single_number(coefficient: Coefficient) -> float | None:
    """The coefficient as one number, if it is one."""
    values = coefficient.values.reshape(-1)
    return float(values[0]) if values.numel() and bool((values == values[0]).all()) else None


def with_tied_names(numbers: dict[str, float], checkpoints: Any) -> dict[str, float]:
    """Numbers for heads that some checkpoint stores beside the embedding they are tied to: mergekit merges both."""
    tied = {alias: name for checkpoint in checkpoints for alias, name in checkpoint.tied.items()}
    return numbers | {alias: numbers[name] for alias, name in tied.items() if name in numbers}


def model_reference(plan: Plan, expert: str) -> str:
    """mergekit's name of a model: a path or hub id, and after '+' an adapter on it."""
    source = plan.experts[expert].source
    if "+" in source or "+" in plan.base.source:
        logger.warning("mergekit reads '+' in a model's path as an adapter: it cannot use the recipe for %s", source)
    return f"{plan.base.source}+{source}" if plan.experts[expert].adapter else source
