"""Gradients: along task vectors per unit, at one point or integrated from base to expert; and of the residual stream.

Formulas: docs/method.md, "Estimators" and "Readouts".

Shape suffixes: n sequences, L layers, D residual width.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.arch import COARSE_KINDS, KINDS, Kind, Layout
from wpmerge.attribution import UnitArrays, empty_arrays
from wpmerge.engine import Engine
from wpmerge.pieces import Forget, Keeper
from wpmerge.readouts import Readout, Trace, output_gradient, trace
from wpmerge.rows import Row
from wpmerge.weights import MixedWeights, Weights, WeightSource


def interpolated(layout: Layout, base: WeightSource, expert: WeightSource, alpha: float) -> MixedWeights:
    """θ_B + α(θ_E − θ_B)."""
    return MixedWeights(layout=layout, sources=(base, expert), mix=lambda _, pair: torch.lerp(pair[0], pair[1], alpha))


def integrated(
    engine: Engine,
    base: WeightSource,
    experts: Sequence[WeightSource],
    rows: Sequence[Row],
    readout: Readout,
    *,
    kinds: Sequence[Kind] = KINDS,
    points: int = 4,
    keeper: Keeper | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[UnitArrays]:
    """Integrated gradients along base → expert: each unit's additive share of the gap, ∫₀¹⟨∇_u F(θ_B+αΔ), Δ_u⟩dα.

    Args:
        engine: runs the layers.
        base: θ_B.
        experts: each a θ_E, with a path of its own.
        rows: the readout's prompts.
        readout: F.
        kinds: which unit kinds to score. Shares over all finest kinds sum to F(θ_E) − F(θ_B); those of a coarse kind
            are sums of the same shares.
        points: Gauss–Legendre nodes.
        keeper: keeps each finished node.
        progress: called with the number of units just finished.

    Returns:
        For each expert the raw shares, in the readout's own unit; NaN for units that the readout cannot see.
    """
    nodes, node_weights = np.polynomial.legendre.leggauss(points)
    keeper, found = keeper or Forget(), []
    for number, expert in enumerate(experts):
        total = empty_arrays(engine.layout, kinds)
        for place, (node, node_weight) in enumerate(zip((nodes + 1) / 2, node_weights / 2, strict=True)):
            key = f"{number}-point-{place}"
            if (shares := keeper.get(key)) is None:
                point = interpolated(engine.layout, base, expert, float(node))
                (arrays,) = directional(engine, point, base, [expert], rows, readout, kinds=kinds)
                shares = {str(kind): array for kind, array in arrays.items()}
                keeper.put(key, shares)
            for kind in total:
                total[kind] = (total[kind] if place else 0.0) + node_weight * shares[kind]
            if progress is not None:
                progress(sum(array.numel() for array in total.values()))
        found.append(total)
    return found


@torch.no_grad()
def directional(
    engine: Engine,
    point: WeightSource,
    base: WeightSource,
    experts: Sequence[WeightSource],
    rows: Sequence[Row],
    readout: Readout,
    *,
    kinds: Sequence[Kind] = KINDS,
) -> list[UnitArrays]:
    """⟨∇_u F(θ), Δ_e[u]⟩ for every unit u and expert e, from one forward and one backward run at θ.

    Args:
        engine: runs the layers.
        point: θ, where the gradient is taken.
        base: what the task vectors Δ_e start from.
        experts: where they end.
        rows: the readout's prompts.
        readout: F.
        kinds: which unit kinds.

    Returns:
        One set of arrays per expert; NaN for units above the readout's layer.
    """
    layout = engine.layout
    run = trace(engine, point, rows, last=readout.layer)
    products = [empty_arrays(layout, kinds) for _ in experts]
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
    total = {name: torch.zeros_like(outer[name], dtype=engine.dtype) for name in names}
    gradients = []
    for row, states in zip(rows, run.hidden, strict=True):
        places = readout.places(row)
        with torch.enable_grad():
            leaves = dict(outer) | {name: outer[name].detach().to(engine.dtype).requires_grad_() for name in names}
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
            leaves = dict(outer) | {name: outer[name].detach().to(engine.dtype).requires_grad_() for name in names}
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
        product = slope * (after[name].to(slope) - before[name].to(slope))
        others = [axis for axis in range(product.ndim) if axis != units.axis]
        along = product.double().sum(dim=others) if others else product.double()
        for segment in units.segments:
            if segment.kind in arrays:
                entries = along.sum()[None] if units.axis is None else along[segment.start : segment.stop]
                span = slice(segment.first, segment.first + segment.count)
                _add(arrays[segment.kind][units.layer, span], entries.view(segment.count, -1).sum(dim=1))
        for kind in COARSE_KINDS:
            if kind in arrays and prefix:
                for index in layout.coarse_units(kind, name):
                    _add(arrays[kind][units.layer, index : index + 1], along.sum()[None])


def _add(into: Tensor, values: Tensor) -> None:
    """Add in place, a NaN counting as nothing yet."""
    into.copy_(torch.nan_to_num(into) + values.to(into))


@torch.no_grad()
def state_gradients(
    engine: Engine, source: WeightSource, rows: Sequence[Row], readout: Readout, tokens: Sequence[int]
) -> Float[Tensor, "n L D"]:
    """∂F with respect to the residual stream after every layer, at one token of each sequence.

    Args:
        engine: runs the layers.
        source: the model.
        rows: the readout's prompts.
        readout: F, a mean over items; the gradients of a sequence are those of its part of it.
        tokens: sequence number → which of its tokens.

    Returns:
        float64; zero above the readout's layer.
    """
    run = trace(engine, source, rows, last=readout.layer)
    outer = source.outer(engine.layout.output_tensors())
    found = torch.zeros(len(tokens), engine.layout.layers, engine.layout.hidden, dtype=torch.float64)
    gradients = [
        output_gradient(engine, outer, row, readout, states[-1]) for row, states in zip(rows, run.hidden, strict=True)
    ]
    del outer
    for index in reversed(range(readout.layer + 1)):
        weights = source.layer(index)
        for number, (row, entry) in enumerate(zip(rows, run.entries, strict=True)):
            places = {item: int(place[tokens[item]]) for item, place in row.places.items()}
            for item, place in places.items():
                # prompts that are the same share a place, and its gradient is the sum of theirs
                sharing = sum(other == place for other in places.values())
                found[item, index] = gradients[number][0, place].double().cpu() / sharing
            with torch.enable_grad():
                leaf = run.hidden[number][index].detach().requires_grad_()
                output = engine.layer(index, weights, leaf, entry.calls[index])
                (gradients[number],) = torch.autograd.grad(output, leaf, gradients[number])
            run.hidden[number].pop()
    return found
