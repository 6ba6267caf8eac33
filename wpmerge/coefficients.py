"""Scores → coefficients: the rules, and the groups of parameters that share a coefficient. Pure functions.

Formulas: docs/method.md, section "From scores to a merge".

Shape suffixes: E experts, G groups.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.arch import KINDS, Kind, Layout, Unit
from wpmerge.attribution import UnitArrays, empty_arrays
from wpmerge.errors import RecipeError, check_ranges
from wpmerge.plan import Coefficient, Granularity
from wpmerge.weights import Weights, WeightSource

Rule = Literal["refine", "scaled", "uniform", "proportional", "select", "joint"]
RULES: tuple[Rule, ...] = ("refine", "scaled", "uniform", "proportional", "select", "joint")
MAX_COEFFICIENT = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSettings:
    """The numbers of a rule.

    Attributes:
        rule: which one.
        power: p of ``proportional``: 0 ignores scores, 1 shares in proportion to them.
        density: ρ of ``select``: the share of an expert's scored parameters, 0 to 1, that gets its full scale.
        floor: of ``select``: what the rest gets, as a share of the scale.
        mu: μ of ``joint``: what leaving the scales costs.
        max_coefficient: λ_max; no coefficient is larger.

    Raises:
        RecipeError: a number out of its range.
    """

    rule: Rule = "scaled"
    power: float = 0.5
    density: float = 0.2
    floor: float = 0.3
    mu: float = 1.0
    max_coefficient: float = MAX_COEFFICIENT

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise RecipeError("there is no such rule", got=self.rule, expected=", ".join(RULES))
        ranges = {
            "power": (0.0, 4.0),
            "density": (0.0, 1.0),
            "floor": (0.0, 1.0),
            "mu": (1e-6, 1e6),
            "max_coefficient": (0.0, 10.0),
        }
        check_ranges(self, ranges)


def apply_rule(
    settings: RuleSettings,
    scores: Float[Tensor, "E G"],
    sizes: Float[Tensor, " G"],
    scales: Float[Tensor, " E"],
) -> Float[Tensor, "E G"]:
    """The coefficients of every group, under a rule that needs an expert's own scores alone.

    Args:
        settings: the rule and its numbers; ``joint`` and ``refine`` start from the scales, which is what they get here.
        scores: R, the recovery of each group from each expert on that expert's own capability; NaN where there is none.
        sizes: parameters in each group.
        scales: s_e.

    Returns:
        λ in [0, max_coefficient]. A group without a score takes the expert's scale.
    """
    flat = scales[:, None].expand_as(scores)
    if settings.rule == "proportional":
        found = _proportional(scores, scales, settings.power)
    elif settings.rule == "select":
        found = _select(scores, sizes, scales, settings.density, settings.floor)
    else:
        found = flat
    return torch.where(scores.isnan(), flat, found).clamp(0.0, settings.max_coefficient)


def _proportional(scores: Float[Tensor, "E G"], scales: Float[Tensor, " E"], power: float) -> Float[Tensor, "E G"]:
    """s_e · E · R₊^p / Σ_e' R₊^p over the experts that have a score; s_e where no expert has a positive one."""
    strength = (scores.clamp_min(0.0) ** power).masked_fill(scores.isnan(), 0.0)
    total = strength.sum(dim=0)
    count = (~scores.isnan()).sum(dim=0)
    shares = torch.where(total > 0, count * strength / total, 1.0)
    return scales[:, None] * shares


def _select(
    scores: Float[Tensor, "E G"], sizes: Float[Tensor, " G"], scales: Float[Tensor, " E"], density: float, floor: float
) -> Float[Tensor, "E G"]:
    """Per expert, the best groups by R₊ per parameter get s_e while they fit into ``density`` of the scored parameters.

    A group too large for what is left is passed over. Groups that recover nothing are never chosen; an expert with
    such groups only gets s_e everywhere, for there is nothing to select by.
    """
    found = scales[:, None] * floor * torch.ones_like(scores)
    for expert, row in enumerate(scores):
        positive = (row > 0).nonzero().flatten()
        if not len(positive):
            found[expert] = scales[expert]
            continue
        order = positive[(row[positive] / sizes[positive]).argsort(descending=True, stable=True)]
        budget = density * float(sizes[~row.isnan()].sum())
        found[expert, order[_fitting(sizes[order].tolist(), budget)]] = scales[expert]
    return found


def _fitting(sizes: Sequence[float], budget: float) -> list[int]:
    """Positions of what is taken in order, as long as it fits; half a parameter of slack for rounding."""
    chosen, room = [], budget + 0.5
    for position, size in enumerate(sizes):
        if size <= room:
            chosen.append(position)
            room -= size
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """Which parameters share a coefficient.

    Attributes:
        granularity: "unit", "tensor", "block" (a layer's attention or MLP module; each norm and each tensor outside
            the layers is its own) or "expert" (all).
        names: one per group.
        sizes: parameters per group.
        of_tensor: canonical tensor name → its group, for all but "unit".
    """

    granularity: Granularity
    names: tuple[str, ...]
    sizes: Float[Tensor, " G"]
    of_tensor: Mapping[str, int]


def make_grouping(layout: Layout, granularity: Granularity) -> Grouping:
    """The groups of a granularity."""
    if granularity == "unit":
        units = [unit for kind in KINDS if kind in layout.counts for unit in layout.units(kind)]
        sizes = torch.tensor([layout.parameters(unit) for unit in units], dtype=torch.float64)
        return Grouping(granularity=granularity, names=tuple(map(str, units)), sizes=sizes, of_tensor={})
    names: dict[str, int] = {}
    of_tensor = {
        tensor: names.setdefault(_group_name(layout, tensor, granularity), len(names)) for tensor in layout.tensors
    }
    sizes = torch.zeros(len(names), dtype=torch.float64)
    for tensor, group in of_tensor.items():
        sizes[group] += torch.Size(layout.shapes[tensor]).numel()
    return Grouping(granularity=granularity, names=tuple(names), sizes=sizes, of_tensor=of_tensor)


def _group_name(layout: Layout, tensor: str, granularity: Granularity) -> str:
    if granularity == "expert":
        return "all"
    if granularity == "block":
        prefix = layout.layer_prefix(layout.tensors[tensor].layer)
        for block in (layout.arch.attention, layout.arch.mlp):
            if tensor.startswith(f"{prefix}{block}."):
                return prefix + block
        return tensor.rpartition(".")[0]
    return tensor


def group_scores(layout: Layout, grouping: Grouping, arrays: UnitArrays) -> Float[Tensor, " G"]:
    """Recovery per group: the sum over its units, each counted by the share of its parameters that lie in the group.

    NaN for a group none of whose units has a score.
    """
    if grouping.granularity == "unit":
        return torch.cat([arrays[kind].double().flatten() for kind in KINDS if kind in layout.counts])
    per_parameter = {kind: arrays[kind].double() / _unit_sizes(layout, kind) for kind in layout.counts}
    total = torch.zeros(len(grouping.names), dtype=torch.float64)
    scored = torch.zeros(len(grouping.names), dtype=torch.bool)
    for tensor, group in grouping.of_tensor.items():
        units, shape = layout.tensors[tensor], layout.shapes[tensor]
        line = torch.Size(shape).numel() // (1 if units.axis is None else shape[units.axis])
        for segment in units.segments:
            density = per_parameter[segment.kind][units.layer, segment.first : segment.first + segment.count]
            known = density[~density.isnan()]
            total[group] += known.sum() * line * segment.width
            scored[group] |= len(known) > 0
    return torch.where(scored, total, torch.nan)


def _unit_sizes(layout: Layout, kind: Kind) -> Float[Tensor, "layers units"]:
    """Parameters per unit; the same in every layer."""
    layers, count = layout.shape(kind)
    sizes = [layout.parameters(Unit(kind=kind, layer=0, index=i)) for i in range(count)]
    return torch.tensor(sizes, dtype=torch.float64).expand(layers, count)


def tensor_coefficients(layout: Layout, grouping: Grouping, values: Float[Tensor, " G"]) -> dict[str, Coefficient]:
    """One expert's coefficients per tensor, under the checkpoint's own tensor names.

    Args:
        layout: names the tensors and knows which entries belong to which unit.
        grouping: what ``values`` are about.
        values: λ per group.
    """
    if grouping.granularity != "unit":
        return {
            layout.stored[tensor]: Coefficient(values=values[group].float().clone())
            for tensor, group in grouping.of_tensor.items()
        }
    arrays = _split_by_kind(layout, values)
    found = {}
    for tensor, units in layout.tensors.items():
        parts = [
            arrays[s.kind][units.layer, s.first : s.first + s.count].repeat_interleave(s.width) for s in units.segments
        ]
        vector = torch.cat(parts).float()
        if units.axis is None:
            found[layout.stored[tensor]] = Coefficient(values=vector[0].clone())
        else:
            found[layout.stored[tensor]] = Coefficient(values=vector, axis=units.axis)
    return found


def _split_by_kind(layout: Layout, values: Float[Tensor, " G"]) -> UnitArrays:
    """Undo the concatenation of :func:`group_scores` at unit granularity."""
    kinds = [kind for kind in KINDS if kind in layout.counts]
    shapes = [layout.shape(kind) for kind in kinds]
    parts = values.split([layers * count for layers, count in shapes])
    return {kind: part.view(shape) for kind, shape, part in zip(kinds, shapes, parts, strict=True)}


def squared_norms(layout: Layout, grouping: Grouping, base: WeightSource, expert: WeightSource) -> Float[Tensor, " G"]:
    """‖Δ_e[g]‖² of every group, one layer's weights at a time."""
    arrays = empty_arrays(layout)
    total = torch.zeros(len(grouping.names), dtype=torch.float64)
    for prefix, before, after in _pairs(layout, base, expert):
        for name, tensor in before.items():
            square = (after[name].double() - tensor.double()).square()
            if grouping.granularity == "unit":
                _add_to_units(layout, prefix + name, square, arrays)
            else:
                total[grouping.of_tensor[prefix + name]] += square.sum().cpu()
    return torch.nan_to_num(group_scores(layout, grouping, arrays)) if grouping.granularity == "unit" else total


def _pairs(layout: Layout, base: WeightSource, expert: WeightSource) -> Iterator[tuple[str, Weights, Weights]]:
    for index in range(layout.layers):
        yield layout.layer_prefix(index), base.layer(index), expert.layer(index)
    yield "", base.outer(), expert.outer()


def _add_to_units(layout: Layout, tensor: str, values: Tensor, arrays: UnitArrays) -> None:
    """Sum a tensor's entries into the units that own them."""
    units = layout.tensors[tensor]
    others = [axis for axis in range(values.ndim) if axis != units.axis]
    along = values.sum(dim=others) if others else values
    for segment in units.segments:
        entries = along.sum()[None] if units.axis is None else along[segment.start : segment.stop]
        span = arrays[segment.kind][units.layer, segment.first : segment.first + segment.count]
        span.copy_(torch.nan_to_num(span) + entries.view(segment.count, -1).sum(dim=1).to(span))


def stack_scores(layout: Layout, grouping: Grouping, per_expert: Sequence[UnitArrays]) -> Float[Tensor, "E G"]:
    """:func:`group_scores` of every expert."""
    return torch.stack([group_scores(layout, grouping, arrays) for arrays in per_expert])
