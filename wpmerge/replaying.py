"""A plan read backwards: which coefficient each unit got, and on what grounds, as far as it says. Pure functions."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.arch import ARCHITECTURES, KINDS, MODEL_KINDS, Architecture, Kind, Layout, Unit
from wpmerge.coefficients import RULES, Grouping, RuleSettings, make_grouping, stack_scores
from wpmerge.plan import Coefficient, Plan
from wpmerge.rules import RuleOutcome
from wpmerge.scores import Scores
from wpmerge.tuning import effects_of, own_scores


def unit_coefficients(plan: Plan, scores: Scores, expert: str, kind: Kind) -> Float[Tensor, "layers units"] | None:
    """The coefficient of every unit of a kind, at the tensor that it writes through.

    At granularity "unit" all tensors of a unit agree; at a coarser one they need not, and the output side is shown.
    No checkpoint is needed: names and order of units are the architecture's.

    Returns:
        [layers or 1, units]; None where the plan has no such tensor.
    """
    arch = ARCHITECTURES.get(scores.model_type)
    if arch is None or kind not in scores.counts or kind not in KINDS:
        return None
    layers, count = 1 if kind in MODEL_KINDS else scores.layers, scores.counts[kind]
    found = torch.full((layers, count), torch.nan)
    for layer in range(layers):
        for index in range(count) if kind in ("norm", "output_bias") else (0,):
            held = _held(plan.coefficients[expert], arch, _tensor(arch, kind, layer, index, scores))
            if held is None:
                return None
            if kind in ("norm", "output_bias"):
                found[layer, index] = held.values.flatten()[0]
            elif held.axis is None:
                found[layer] = held.values
            else:
                found[layer] = _units_along(held.values, arch, kind, scores)
    return found


def _tensor(arch: Architecture, kind: Kind, layer: int, index: int, scores: Scores) -> str:
    """The tensor a unit writes through, by its canonical name."""
    outer = {
        "embedding": f"{arch.body}.{arch.embedding}.weight",
        "positions": f"{arch.body}.{arch.positions}.weight",
        "final_norm": f"{arch.body}.{arch.final_norm}.weight",
        "lm_head": "lm_head.weight",
    }
    if kind in outer:
        return outer[kind]
    prefix = f"{arch.body}.{arch.layers}.{layer}."
    if kind in ("norm", "output_bias"):
        return prefix + scores.labels[kind][index] + (".weight" if kind == "norm" else ".bias")
    shared = next(rule.module for rule in arch.rules if "kv_group" in rule.parts)
    return prefix + {"head": arch.attention_out, "neuron": arch.mlp_out}.get(kind, shared) + ".weight"


def _held(tensors: Mapping[str, Coefficient], arch: Architecture, name: str) -> Coefficient | None:
    """A tensor's coefficient, under its canonical name or one that checkpoints of the architecture use for it."""
    other = name.replace("lm_head.", f"{arch.stored_head}.", 1) if name.startswith("lm_head.") else name
    for each in (name, other, name.removeprefix(f"{arch.body}.")):
        if each in tensors:
            return tensors[each]
    return None


def _units_along(
    values: Float[Tensor, " n"], arch: Architecture, kind: Kind, scores: Scores
) -> Float[Tensor, " units"]:
    """One number per unit of a vector in which every unit has a run of equal entries."""
    count = scores.counts[kind]
    if kind == "kv_group":
        rule = next(rule for rule in arch.rules if "kv_group" in rule.parts)
        width = len(values) // sum(scores.counts[part] for part in rule.parts)
        if rule.interleaved:
            return values.view(count, len(rule.parts), width)[:, rule.parts.index(kind), 0]
        before = sum(scores.counts[part] for part in rule.parts[: rule.parts.index(kind)])
        values = values[before * width : (before + count) * width]
    return values.view(count, -1)[:, 0]


def outcome_of_plan(plan: Plan, scores: Scores, layout: Layout) -> RuleOutcome | None:
    """What a rule decided, as :mod:`wpmerge.explaining` takes it, from its plan and the scores.

    A plan keeps coefficients, scales and the factors of ``refine``, not the multipliers of ``joint``.

    Args:
        plan: made from these scores.
        scores: what the rule went by.
        layout: of the base.

    Returns:
        None of a plan that no rule made.
    """
    chosen, known = plan.provenance.get("scales"), dict(plan.provenance.get("settings") or {})
    if plan.rule not in RULES or not chosen:
        return None
    names = {each.name for each in fields(RuleSettings)}
    numbers: dict[str, Any] = {name: value for name, value in {**known, **plan.provenance}.items() if name in names}
    settings = RuleSettings(**{**numbers, "rule": plan.rule})
    experts = list(plan.experts)
    grouping = make_grouping(layout, plan.granularity)
    return RuleOutcome(
        coefficients=plan.coefficients,
        values=torch.stack([_group_values(plan, layout, grouping, expert) for expert in experts]),
        grouping=grouping,
        settings=settings,
        scales={name: float(chosen[name]) for name in experts},
        own=stack_scores(layout, grouping, [own_scores(scores, name, layout) for name in experts]),
        effects=effects_of(scores, layout, grouping, experts),
        standing=None,
        evaluations=int(plan.provenance.get("evaluations", 0)),
        tolerance=float(known.get("tolerance", 0.0)),
        factors=plan.provenance.get("factors", {}),
    )


def _group_values(plan: Plan, layout: Layout, grouping: Grouping, expert: str) -> Float[Tensor, " G"]:
    tensors = plan.coefficients[expert]
    values = torch.full((len(grouping.names),), torch.nan, dtype=torch.float64)
    for tensor, group in grouping.of_tensor.items():
        values[group] = tensors[layout.stored[tensor]].values.double()
    if grouping.granularity != "unit":
        return values
    number = {name: place for place, name in enumerate(grouping.names)}
    for tensor, units in layout.tensors.items():
        held = tensors[layout.stored[tensor]].values.double()
        for part in units.segments:
            for i in range(part.count):
                unit = Unit(kind=part.kind, layer=units.layer, index=part.first + i)
                values[number[str(unit)]] = held if held.ndim == 0 else held[part.start + i * part.width]
    return values
