"""Controls beside a rule: what its coefficients do when they stand at other units, or are one number. Pure.

Shape suffixes: U units of a kind in a layer, W entries of a unit in a tensor.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from wpmerge.arch import Layout, TensorUnits
from wpmerge.plan import Coefficient

Coefficients = Mapping[str, Mapping[str, Coefficient]]


def shuffled(layout: Layout, coefficients: Coefficients, *, seed: int) -> dict[str, dict[str, Coefficient]]:
    """Each expert's coefficients, dealt anew among the units of a kind within each layer.

    A unit's slices move together in all its tensors, so what a unit was given stays together; how large coefficients
    are in each layer, kind and expert stays too. Only which unit has which is lost. Where a layer's coefficients are
    single numbers there are no units to shuffle: whole layers then change places.
    """
    dealt: dict[str, dict[str, Coefficient]] = {}
    for number, (expert, found) in enumerate(coefficients.items()):
        generator = torch.Generator().manual_seed(1009 * seed + number)
        if all(coefficient.axis is None for coefficient in found.values()):
            dealt[expert] = _layers_dealt(layout, found, torch.randperm(layout.layers, generator=generator).tolist())
            continue
        orders: dict[tuple[str, int], Tensor] = {}
        for layer in range(layout.layers):
            for kind in layout.counts:
                orders[kind, layer] = torch.randperm(layout.shape(kind)[1], generator=generator)
        dealt[expert] = {
            stored: found[stored] if found[stored].axis is None else _units_dealt(found[stored], units, orders)
            for stored, units in ((layout.stored[name], units) for name, units in layout.tensors.items())
        }
    return dealt


def _units_dealt(own: Coefficient, units: TensorUnits, orders: Mapping[tuple[str, int], Tensor]) -> Coefficient:
    source = torch.arange(len(own.values))
    for kind in {segment.kind for segment in units.segments}:
        segments = [segment for segment in units.segments if segment.kind == kind]
        starts_u = torch.cat([s.start + s.width * torch.arange(s.count) for s in segments])
        offsets_w = torch.arange(segments[0].width)
        order = orders[kind, units.layer]
        source[starts_u[:, None] + offsets_w] = starts_u[order][:, None] + offsets_w
    return Coefficient(values=own.values[source], axis=own.axis)


def _layers_dealt(layout: Layout, found: Mapping[str, Coefficient], order: list[int]) -> dict[str, Coefficient]:
    dealt = {layout.stored[name]: found[layout.stored[name]] for name in layout.outer_tensors()}
    for layer in range(layout.layers):
        here, there = layout.layer_prefix(layer), layout.layer_prefix(order[layer])
        for name in layout.layer_tensors(layer):
            dealt[layout.stored[name]] = found[layout.stored[there + name.removeprefix(here)]]
    return dealt


def same_norm(
    layout: Layout, coefficients: Coefficients, deltas: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Coefficient]]:
    """One coefficient for everything, such that the merged task vector is as long as the rule's.

    Args:
        layout: names the tensors.
        coefficients: the rule's.
        deltas: expert → canonical tensor name → task vector; tensors in which the expert did not move may be missing.
    """
    rule, plain = 0.0, 0.0
    for name in layout.tensors:
        moved = {expert: deltas[expert][name] for expert in coefficients if name in deltas[expert]}
        if not moved:
            continue
        weighted = [coefficients[e][layout.stored[name]].expand(d.shape) * d for e, d in moved.items()]
        rule += float(torch.stack(weighted).sum(dim=0).double().square().sum())
        plain += float(torch.stack(list(moved.values())).sum(dim=0).double().square().sum())
    scale = Coefficient(values=torch.tensor(math.sqrt(rule / plain) if plain else 0.0))
    return {expert: {layout.stored[name]: scale for name in layout.tensors} for expert in coefficients}
