"""The numbers behind one coefficient, in one sentence. Pure functions."""

import math
from collections.abc import Callable, Sequence

import torch

from wpmerge.arch import KINDS, Layout
from wpmerge.coefficients import Grouping, make_grouping
from wpmerge.errors import RecipeError
from wpmerge.plan import Granularity
from wpmerge.rules import RuleOutcome


def explain_many(outcome: RuleOutcome, layout: Layout, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """:func:`explain` of many units or groups, each found as quickly as one.

    Raises:
        RecipeError: there is no such unit or group.
    """
    find = _finder(layout, outcome.grouping)
    return {
        name: tuple(_sentence(outcome, expert, group) for group in find(name) for expert in outcome.scales)
        for name in names
    }


def explain(outcome: RuleOutcome, layout: Layout, name: str) -> tuple[str, ...]:
    """One sentence for each expert's coefficient of a unit.

    Args:
        outcome: what a rule decided.
        layout: knows the units.
        name: a unit's id, such as head.18.4, or a group of the outcome's granularity, such as a tensor's name. A unit
            whose parameters lie in several groups gets a sentence for each.

    Raises:
        RecipeError: there is no such unit or group.
    """
    return explain_many(outcome, layout, [name])[name]


def check_names(names: Sequence[str], layout: Layout, granularity: Granularity) -> None:
    """Refuse what cannot be explained, before anything is run.

    Raises:
        RecipeError: there is no such unit or group.
    """
    if names:
        find = _finder(layout, make_grouping(layout, granularity))
        for name in names:
            find(name)


def _finder(layout: Layout, grouping: Grouping) -> Callable[[str], list[int]]:
    """A function from a unit's or group's name to the groups its parameters lie in."""
    groups = {name: number for number, name in enumerate(grouping.names)}
    units = {str(unit): unit for kind in KINDS if kind in layout.counts for unit in layout.units(kind)}

    def find(name: str) -> list[int]:
        if name in groups:
            return [groups[name]]
        if name not in units:
            raise RecipeError(
                "there is no such unit to explain",
                got=name,
                expected=f"a unit such as {next(iter(units))}, or one of {len(groups)} such as {grouping.names[0]}",
            )
        return sorted({grouping.of_tensor[piece.tensor] for piece in layout.slices(units[name])})

    return find


def _sentence(outcome: RuleOutcome, expert: str, group: int) -> str:
    """Coefficient, formula with its numbers, clipping, then every score of the group."""
    number = list(outcome.scales).index(expert)
    value = float(outcome.values[number, group])
    size = int(outcome.grouping.sizes[group])
    text = f"{expert} gets {value:.4g} at {outcome.grouping.names[group]} ({size:,} parameters): "
    return text + _formula(outcome, number, group, expert) + "; " + _scores(outcome, number, group, expert)


def _formula(outcome: RuleOutcome, number: int, group: int, expert: str) -> str:
    rule, scale = outcome.settings.rule, outcome.scales[expert]
    if rule == "refine":
        return _refined(outcome, expert, number, group)
    if rule in ("uniform", "scaled"):
        whose = "common" if rule == "uniform" else "expert's"
        return f"{rule}, the {whose} scale {scale:.4g}" + _clipped(outcome, scale)
    read = list(outcome.effects.values()) if rule == "joint" else [outcome.own]
    if all(bool(each[number, group].isnan()) for each in read):
        return f"{rule}, no score, so the expert's scale {scale:.4g}"
    return {"joint": _joint, "proportional": _proportional, "select": _selected}[rule](outcome, number, group, scale)


def _proportional(outcome: RuleOutcome, number: int, group: int, scale: float) -> str:
    power = outcome.settings.power
    column = outcome.own[:, group]
    scored = ~column.isnan()
    strength = torch.where(scored, column.clamp_min(0.0) ** power, 0.0)
    total = float(strength.sum())
    if total <= 0:
        return f"proportional, no expert's score here is positive, so the expert's scale {scale:.4g}"
    terms = " + ".join(f"{float(each):.3g}" for each in strength[scored])
    found = scale * int(scored.sum()) * float(strength[number]) / total
    return (
        f"proportional, s·E·R₊^p/ΣR₊^p = {scale:.4g} · {int(scored.sum())} · {float(strength[number]):.3g} / "
        f"({terms}) = {found:.4g} with p = {power:.3g}" + _clipped(outcome, found)
    )


def _selected(outcome: RuleOutcome, number: int, group: int, scale: float) -> str:
    settings = outcome.settings
    if _same(float(outcome.values[number, group]), min(scale, settings.max_coefficient)):
        text, found = "among the selected, so the scale", scale
    else:
        text, found = (
            f"not among the selected, so {settings.floor:.3g} of the scale {scale:.4g}",
            settings.floor * scale,
        )
    per = float(outcome.own[number, group]) / float(outcome.grouping.sizes[group])
    share = f"recovery per parameter {per:.3g}, best {settings.density:.0%} of parameters selected"
    return f"select, {text} = {found:.4g} ({share})" + _clipped(outcome, found)


def _joint(outcome: RuleOutcome, number: int, group: int, scale: float) -> str:
    solution, value = outcome.joint, float(outcome.values[number, group])
    if solution is None:
        moved = f"joint, the scale {scale:.4g} moved by {value - scale:+.4g}"
        return f"{moved}, the optimum with μ = {outcome.settings.mu:.3g}" + _bounded(outcome, value)
    worth = ", ".join(f"{name} {float(a):.3g}" for name, a in zip(outcome.scales, solution.multipliers, strict=True))
    retained = [name for name in outcome.effects if name not in outcome.scales]
    prices = ", ".join(f"{name} {float(v):.3g}" for name, v in zip(retained, solution.prices, strict=True))
    priced = f", {outcome.tolerance:.3g} nats per token of {prices}" if prices else ""
    return (
        f"joint, the scale {scale:.4g} moved by (Σ a_f C_f/T_f + Σ ν_r C_r)/(μ w) = {value - scale:+.4g} with "
        f"μ = {outcome.settings.mu:.3g}, a retained gap being worth {worth}{priced}" + _bounded(outcome, value)
    )


def _refined(outcome: RuleOutcome, expert: str, number: int, group: int) -> str:
    value, factor = float(outcome.values[number, group]), outcome.factors.get(expert, 1.0)
    text = f"refine, from {outcome.scales[expert]:.4g}"
    if factor == 0.0:
        return f"{text}, then times 0 for the retain sets"
    reached = value / factor
    moved = round(reached - outcome.scales[expert], 6) + 0.0  # a plan keeps float32; no "-0"
    text += f" by {moved:+.3g} = {reached:.4g}" + _bounded(outcome, reached)
    return text if factor == 1.0 else f"{text}, then times {factor:.3g} for the retain sets"


def _clipped(outcome: RuleOutcome, value: float) -> str:
    highest = outcome.settings.max_coefficient
    if value > highest:
        return f", clipped to {highest:.4g}"
    return ", clipped to 0" if value < 0 else ", not clipped"


def _bounded(outcome: RuleOutcome, value: float) -> str:
    highest = outcome.settings.max_coefficient
    return f", clipped to {value:.4g}" if value == 0.0 or _same(value, highest) else ", not clipped"


def _same(value: float, other: float) -> bool:
    """Equal as far as a plan can say, which keeps float32."""
    return math.isclose(value, other, rel_tol=1e-6)


def _scores(outcome: RuleOutcome, number: int, group: int, expert: str) -> str:
    """Recoveries of every expert on its own capability, this expert's on the others, its effects on retain sets."""
    own = ", ".join(f"{name} {_number(outcome.own[i, group])}" for i, name in enumerate(outcome.scales))
    text = f"recovery of each expert's own capability: {own}"
    cross = [
        f"{name} {_number(each[number, group])}"
        for name, each in outcome.effects.items()
        if name in outcome.scales and name != expert
    ]
    kept = [
        f"{name} {_number(each[number, group])}" for name, each in outcome.effects.items() if name not in outcome.scales
    ]
    if cross:
        text += f"; of the others' from {expert}: {', '.join(cross)}"
    if kept:
        text += f"; nats per token on retain sets from {expert}: {', '.join(kept)}"
    return text


def _number(value: torch.Tensor) -> str:
    return "none" if bool(value.isnan()) else f"{float(value):.3g}"
