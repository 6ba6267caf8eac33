"""Gradients: along task vectors per unit, at one point or integrated from base to expert; and of the residual stream.

Formulas: docs/method.md, "Estimators" and "Readouts".

Shape suffixes: n sequences, L layers, D residual width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.arch import COARSE_KINDS, KINDS, Kind, Layout
from wpmerge.attribution import UnitArrays, empty_arrays
from wpmerge.engine import Engine, Entry
from wpmerge.pieces import Forget, Keeper
from wpmerge.readouts import Readout, Trace, output_gradient, read_states, trace
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Term:
    """A term of a sum Σ w_i F_i that is differentiated: a readout's items, and what each counts.

    Attributes:
        rows: the readout's prompts.
        readout: F_i, a number per item.
        weigh: F_i → w_i, [items] → [items]: the derivative of what is wanted with respect to each item. None: a mean.
    """

    rows: Sequence[Row]
    readout: Readout
    weigh: Callable[[Float[Tensor, " items"]], Float[Tensor, " items"]] | None = None


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
    return directional_sum(engine, point, base, experts, [Term(rows=rows, readout=readout)], kinds=kinds)


@torch.no_grad()
def directional_sum(
    engine: Engine,
    point: WeightSource,
    base: WeightSource,
    experts: Sequence[WeightSource],
    terms: Sequence[Term],
    *,
    kinds: Sequence[Kind] = KINDS,
) -> list[UnitArrays]:
    """:func:`directional` of a sum of terms: every layer's weights and task vectors are made once for all of them.

    Args:
        engine: runs the layers.
        point: θ, where the gradient is taken.
        base: what the task vectors Δ_e start from.
        experts: where they end.
        terms: their readouts are read after the same layer. One that weighs its items has them read once more, without
            gradients, after the forward run; one that weighs nothing is not run backwards.
        kinds: which unit kinds.

    Returns:
        One set of arrays per expert; NaN for units above the readouts' layer, zeros where no term weighs anything.
    """
    layout, last = engine.layout, terms[0].readout.layer
    assert all(term.readout.layer == last for term in terms), "terms are read after one layer"
    run = trace(engine, point, [row for term in terms for row in term.rows], last=last)
    outer = point.outer()
    back = _rows_back(engine, outer, terms, run)
    found = [empty_arrays(layout, kinds) for _ in experts]
    if not back:
        for array in (array for arrays in found for array in arrays.values()):
            array.zero_()
        return found
    outer_gradients: Weights = {}
    gradients = [_outer_backward(engine, outer, row, outer_gradients) for row in back]
    del outer, run
    for index in reversed(range(last + 1)):
        weights = {name: value.detach().requires_grad_() for name, value in point.layer(index).items()}
        layer_gradients: Weights = {}
        for number, row in enumerate(back):
            with torch.enable_grad():
                leaf = row.states[index].detach().requires_grad_()
                output = engine.layer(index, weights, leaf, row.entry.calls[index])
                gradients[number], *own = torch.autograd.grad(output, [leaf, *weights.values()], gradients[number])
            row.states.pop()
            _collect(layer_gradients, dict(zip(weights, own, strict=True)))
        before = base.layer(index)
        for arrays, expert in zip(found, experts, strict=True):
            _add_products(layout, layout.layer_prefix(index), layer_gradients, before, expert.layer(index), arrays)
        del weights, layer_gradients, leaf, output, own, before  # before the next layer's are made
    outer = point.outer()
    for row, gradient in zip(back, gradients, strict=True):
        _add_input_gradient(engine, outer, row.row, gradient, outer_gradients)
    del outer
    before = base.outer()
    for arrays, expert in zip(found, experts, strict=True):
        _add_products(layout, "", outer_gradients, before, expert.outer(), arrays)
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _RowBack:
    """A row that is run backwards: how it entered, the residual stream after each layer, and what its items count."""

    row: Row
    entry: Entry
    states: list[Float[Tensor, "1 _ D"]]
    readout: Readout
    item_weights: Float[Tensor, " items"]


def _rows_back(engine: Engine, outer: Weights, terms: Sequence[Term], run: Trace) -> list[_RowBack]:
    """The rows of all terms but those that weigh nothing."""
    found, start = [], 0
    for term in terms:
        end = start + len(term.rows)
        entries, states = run.entries[start:end], run.hidden[start:end]
        start = end
        if term.weigh is None:
            weights = torch.full((term.readout.items,), 1.0 / term.readout.items, dtype=torch.float64)
        else:
            ends = [each[-1] for each in states]
            weights = term.weigh(read_states(engine, outer, term.rows, term.readout, ends)[0])
        if weights.any():
            found += [
                _RowBack(row=row, entry=entry, states=own, readout=term.readout, item_weights=weights)
                for row, entry, own in zip(term.rows, entries, states, strict=True)
            ]
    return found


def _outer_backward(engine: Engine, outer: Weights, back: _RowBack, total: Weights) -> Float[Tensor, "1 T D"]:
    """The gradient at a row's last residual stream; those of final norm and head, if read, are added to ``total``."""
    readout, row, state, layout = back.readout, back.row, back.states[-1], engine.layout
    if not readout.reads_output:
        return output_gradient(engine, outer, row, readout, state, item_weights=back.item_weights)
    body = f"{layout.arch.body}.{layout.arch.final_norm}."
    names = [name for name in outer if name.startswith((body, "lm_head.")) or name == layout.head]
    with torch.enable_grad():
        leaves = dict(outer) | {name: outer[name].detach().to(engine.dtype).requires_grad_() for name in names}
        hidden = state.detach().requires_grad_()
        found = readout.read(engine, leaves, hidden[:, readout.places(row)], row)[0]
        gradient, *parts = torch.autograd.grad(
            (found * back.item_weights.to(found)).sum(), [hidden, *(leaves[name] for name in names)]
        )
    _collect(total, dict(zip(names, parts, strict=True)))
    return gradient


def _add_input_gradient(
    engine: Engine, outer: Weights, row: Row, gradient: Float[Tensor, "1 T D"], total: Weights
) -> None:
    layout = engine.layout
    names = [layout.embedding]
    if layout.arch.positions:
        names.append(f"{layout.arch.body}.{layout.arch.positions}.weight")
    with torch.enable_grad():
        leaves = dict(outer) | {name: outer[name].detach().to(engine.dtype).requires_grad_() for name in names}
        parts = torch.autograd.grad(engine.embed(leaves, row).hidden, [leaves[name] for name in names], gradient)
    _collect(total, dict(zip(names, parts, strict=True)))


def _collect(total: Weights, parts: Mapping[str, Tensor]) -> None:
    for name, part in parts.items():
        total[name] = total[name].add_(part) if name in total else part


def _add_products(
    layout: Layout,
    prefix: str,
    gradients: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    sums: UnitArrays,
) -> None:
    """Add gradient · (after − before), summed over each unit's slices, to its entry."""
    for name, gradient in gradients.items():
        units = layout.tensors[prefix + name]
        product = gradient * (after[name].to(gradient) - before[name].to(gradient))
        others = [axis for axis in range(product.ndim) if axis != units.axis]
        along = (product.sum(dim=others) if others else product).double()
        for segment in units.segments:
            if segment.kind in sums:
                entries = along.sum()[None] if units.axis is None else along[segment.start : segment.stop]
                span = slice(segment.first, segment.first + segment.count)
                _add(sums[segment.kind][units.layer, span], entries.view(segment.count, -1).sum(dim=1))
        for kind in COARSE_KINDS:
            if kind in sums and prefix:
                for index in layout.coarse_units(kind, name):
                    _add(sums[kind][units.layer, index : index + 1], along.sum()[None])


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
