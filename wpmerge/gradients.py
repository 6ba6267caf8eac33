"""Gradient · task vector per unit: at one point, and integrated from base to expert (docs/method.md, "Estimators")."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from wpmerge.arch import Layout
from wpmerge.attribution import UnitArrays, empty_arrays
from wpmerge.engine import Engine
from wpmerge.readouts import Readout, Trace, measure, output_gradient, trace
from wpmerge.rows import Row
from wpmerge.weights import MixedWeights, Weights, WeightSource


def interpolated(layout: Layout, base: WeightSource, expert: WeightSource, alpha: float) -> MixedWeights:
    """θ_B + α(θ_E − θ_B)."""
    return MixedWeights(layout=layout, sources=(base, expert), mix=lambda _, pair: torch.lerp(pair[0], pair[1], alpha))


def integrated(
    engine: Engine,
    base: WeightSource,
    expert: WeightSource,
    rows: Sequence[Row],
    readout: Readout,
    *,
    points: int = 4,
) -> tuple[UnitArrays, float]:
    """Integrated gradients along base → expert: each unit's additive share of the gap, ∫₀¹⟨∇_u F(θ_B+αΔ), Δ_u⟩dα.

    Args:
        engine: runs the layers.
        base: θ_B.
        expert: θ_E.
        rows: the readout's prompts.
        readout: F.
        points: Gauss–Legendre nodes.

    Returns:
        Raw shares over all finest units, and the completeness residual: their sum minus F(θ_E) − F(θ_B).
    """
    nodes, node_weights = np.polynomial.legendre.leggauss(points)
    total = empty_arrays(engine.layout)
    for node, node_weight in zip((nodes + 1) / 2, node_weights / 2, strict=True):
        point = interpolated(engine.layout, base, expert, float(node))
        (shares,) = directional(engine, point, base, [expert], rows, readout)
        for kind, share in shares.items():
            total[kind] = torch.nan_to_num(total[kind]) + node_weight * share
    gap = measure(engine, expert, rows, readout).double().mean() - measure(engine, base, rows, readout).double().mean()
    for kind, array in total.items():
        array[torch.isnan(shares[kind])] = torch.nan
    residual = sum(float(array.nansum()) for array in total.values()) - float(gap)
    return total, residual


@torch.no_grad()
def directional(
    engine: Engine,
    point: WeightSource,
    base: WeightSource,
    experts: Sequence[WeightSource],
    rows: Sequence[Row],
    readout: Readout,
) -> list[UnitArrays]:
    """⟨∇_u F(θ), Δ_e[u]⟩ for every finest unit u and expert e, from one forward and one backward run at θ.

    Args:
        engine: runs the layers.
        point: θ, where the gradient is taken.
        base: what the task vectors Δ_e start from.
        experts: where they end.
        rows: the readout's prompts.
        readout: F.

    Returns:
        One set of arrays per expert; NaN for units above the readout's layer.
    """
    layout = engine.layout
    run = trace(engine, point, rows, last=readout.layer)
    products = [empty_arrays(layout) for _ in experts]
    gradients, outer_gradient = _outer_backward(engine, point.outer(), rows, readout, run)
    for index in reversed(range(readout.layer + 1)):
        weights = {name: value.detach().requires_grad_() for name, value in point.layer(index).items()}
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        for number, entry in enumerate(run.entries):
            with torch.enable_grad():
                leaf = run.hidden[number][index].detach().requires_grad_()
                output = engine.layer(index, weights, leaf, entry.calls[index])
                gradients[number], *parts = torch.autograd.grad(output, [leaf, *weights.values()], gradients[number])
            run.hidden[number].pop()
            for name, part in zip(total, parts, strict=True):
                total[name] += part
        before = base.layer(index)
        for arrays, expert in zip(products, experts, strict=True):
            _add_products(layout, layout.layer_prefix(index), total, before, expert.layer(index), arrays)
    _add_input_gradient(engine, point.outer(), rows, gradients, outer_gradient)
    before = base.outer()
    for arrays, expert in zip(products, experts, strict=True):
        _add_products(layout, "", outer_gradient, before, expert.outer(), arrays)
    return products


def _outer_backward(
    engine: Engine, outer: Weights, rows: Sequence[Row], readout: Readout, run: Trace
) -> tuple[list[Tensor], Weights]:
    """∂F at each row's last residual stream, and ∂F of final norm and head (absent where the readout stops below)."""
    if not readout.reads_output:
        read = [
            output_gradient(engine, outer, row, readout, states[-1])
            for row, states in zip(rows, run.hidden, strict=True)
        ]
        return read, {}
    layout = engine.layout
    body = f"{layout.arch.body}.{layout.arch.final_norm}."
    names = [name for name in outer if name.startswith((body, "lm_head.")) or name == layout.head]
    total = {name: torch.zeros_like(outer[name]) for name in names}
    gradients = []
    for row, states in zip(rows, run.hidden, strict=True):
        places = readout.places(row)
        with torch.enable_grad():
            leaves = dict(outer) | {name: outer[name].detach().requires_grad_() for name in names}
            hidden = states[-1].detach().requires_grad_()
            value = readout.read(engine, leaves, hidden[:, places], row).sum() / readout.items
            gradient, *parts = torch.autograd.grad(value, [hidden, *(leaves[name] for name in names)])
        gradients.append(gradient)
        for name, part in zip(names, parts, strict=True):
            total[name] += part
    return gradients, total


def _add_input_gradient(
    engine: Engine, outer: Weights, rows: Sequence[Row], gradients: Sequence[Tensor], total: Weights
) -> None:
    layout = engine.layout
    names = [layout.embedding]
    if layout.arch.positions:
        names.append(f"{layout.arch.body}.{layout.arch.positions}.weight")
    for row, gradient in zip(rows, gradients, strict=True):
        with torch.enable_grad():
            leaves = dict(outer) | {name: outer[name].detach().requires_grad_() for name in names}
            hidden = engine.embed(leaves, row).hidden
            parts = torch.autograd.grad(hidden, [leaves[name] for name in names], gradient)
        for name, part in zip(names, parts, strict=True):
            total[name] = total[name] + part if name in total else part


def _add_products(
    layout: Layout,
    prefix: str,
    gradient: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    arrays: UnitArrays,
) -> None:
    """Sum gradient · (after − before) over each unit's slices into ``arrays``."""
    for name, slope in gradient.items():
        units = layout.tensors[prefix + name]
        product = slope * (after[name] - before[name])
        others = [axis for axis in range(product.ndim) if axis != units.axis]
        along = product.double().sum(dim=others) if others else product.double()
        for segment in units.segments:
            entries = along.sum()[None] if units.axis is None else along[segment.start : segment.stop]
            array = arrays[segment.kind][units.layer]
            span = slice(segment.first, segment.first + segment.count)
            array[span] = torch.nan_to_num(array[span]) + entries.view(segment.count, -1).sum(dim=1).to(array)
