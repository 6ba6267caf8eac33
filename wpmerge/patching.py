"""Exact weight patching: replace, run, read. The definition of a score, and the judge of the estimators.

Only what changes is computed. Layers below a unit come from the base's trace; heads and neurons write additively, so
the unit's own layer differs by one term; all units of a layer go through the layers above as one batch; nothing above
the readout's layer is run.

Shape suffixes: U units of a batch, T tokens of a row, D residual width, H attention inputs to W_O, I neurons.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.arch import Slice, Unit
from wpmerge.engine import Engine, Taps
from wpmerge.pieces import Forget, Keeper
from wpmerge.readouts import Readout, Trace, measure, read_states, trace
from wpmerge.rows import Row
from wpmerge.weights import Weights, WeightSource, differs, swap, swap_kind

BATCH_TOKENS = 4096
"""Tokens of patched copies that go through a layer at once."""
HELD_BYTES = 1 << 27
"""Residual streams of patched copies that are held between layers, bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Units of one layer that go through the layers above as one batch, beside a copy that nothing was done to."""

    layer: int
    units: tuple[Unit, ...]


@torch.no_grad()
def exact(
    engine: Engine,
    base: WeightSource,
    expert: WeightSource,
    rows: Sequence[Row],
    readout: Readout,
    units: Sequence[Unit],
    *,
    batch_tokens: int = BATCH_TOKENS,
    held_bytes: int = HELD_BYTES,
    keeper: Keeper | None = None,
    progress: Callable[[int], None] | None = None,
) -> Float[Tensor, "units items"]:
    """F(base with u from the expert) − F(base), per item, for each of ``units``.

    Each effect is the difference to a no-op copy in the same batch, so that rounding that depends on the batch cancels.

    Args:
        engine: runs the layers.
        base: the weights that are patched.
        expert: where units come from.
        rows: the readout's prompts.
        readout: F.
        units: finest or coarse; any order.
        batch_tokens: tokens that go through a layer at once.
        held_bytes: bound on the residual streams held between layers; units beyond it wait for another pass.
        keeper: keeps the effects of each finished pass; the same arguments make the same passes.
        progress: called with the number of units just finished.

    Returns:
        Raw effects, in the readout's own unit, in the order of ``units``; NaN for units that the readout cannot see.
    """
    effects = torch.full((len(units), readout.items), torch.nan, dtype=torch.float64)
    place = {unit: number for number, unit in enumerate(units)}
    visible = [unit for unit in units if _is_visible(engine, unit, readout)]
    seen = _changed(engine, base, expert, visible)
    for unit in set(visible) - set(seen):
        effects[place[unit]] = 0.0
    _tell(progress, len(units) - len(seen))
    run = trace(engine, base, rows, last=readout.layer) if seen else Trace(entries=[], hidden=[])
    for unit in seen:
        if engine.layout.is_outer(unit):
            effects[place[unit]] = _outer_effect(engine, base, expert, rows, readout, unit, run)
            _tell(progress, 1)
    tokens = sum(row.tokens.shape[1] for row in rows)
    longest = max(row.tokens.shape[1] for row in rows)
    size = max(1, batch_tokens // longest - 1)
    groups = list(_groups([unit for unit in seen if not engine.layout.is_outer(unit)], size))
    bytes_per_copy = tokens * engine.layout.hidden * torch.finfo(engine.dtype).bits // 8
    keeper = keeper or Forget()
    for number, batch in enumerate(_passes(groups, max(size + 1, held_bytes // bytes_per_copy))):
        found = keeper.get(f"pass-{number}")
        if found is None:
            values = _run_pass(engine, base, expert, rows, readout, run, batch)
            found = {str(unit): value for group, part in values for unit, value in zip(group.units, part, strict=True)}
            keeper.put(f"pass-{number}", found)
        for group in batch:
            for unit in group.units:
                effects[place[unit]] = found[str(unit)]
            _tell(progress, len(group.units))
    return effects


def _is_visible(engine: Engine, unit: Unit, readout: Readout) -> bool:
    if engine.layout.is_outer(unit):
        return readout.reads_output or unit.kind in ("embedding", "positions")
    return unit.layer <= readout.layer


def _changed(engine: Engine, base: WeightSource, expert: WeightSource, units: Sequence[Unit]) -> list[Unit]:
    """Those units in which the models differ, layer by layer."""
    layout = engine.layout
    found = [unit for unit in units if layout.is_outer(unit) and _outer_differs(base, expert, layout.slices(unit))]
    for index in sorted({unit.layer for unit in units if not layout.is_outer(unit)}):
        members = [unit for unit in units if unit.layer == index and not layout.is_outer(unit)]
        one, other, prefix = base.layer(index), expert.layer(index), layout.layer_prefix(index)
        found += [unit for unit in members if differs(layout.slices(unit), one, other, prefix=prefix)]
    return found


def _outer_differs(base: WeightSource, expert: WeightSource, pieces: Sequence[Slice]) -> bool:
    names = [piece.tensor for piece in pieces]
    return differs(pieces, base.outer(names), expert.outer(names))


def _tell(progress: Callable[[int], None] | None, count: int) -> None:
    if progress is not None:
        progress(count)


def _groups(units: Sequence[Unit], size: int) -> Iterator[_Group]:
    """Split units by layer and by whether they are heads, whose own MLP has to be run again, into batches."""
    keys = sorted({(unit.layer, unit.kind == "head") for unit in units})
    for layer, is_head in keys:
        members = [unit for unit in units if unit.layer == layer and (unit.kind == "head") == is_head]
        for start in range(0, len(members), size):
            yield _Group(layer=layer, units=tuple(members[start : start + size]))


def _passes(groups: Sequence[_Group], copies: int) -> Iterator[list[_Group]]:
    """Consecutive groups that together hold at most ``copies`` residual streams."""
    batch: list[_Group] = []
    held = 0
    for group in groups:
        needs = len(group.units) + 1
        if batch and held + needs > copies:
            yield batch
            batch, held = [], 0
        batch.append(group)
        held += needs
    if batch:
        yield batch


def _run_pass(
    engine: Engine,
    base: WeightSource,
    expert: WeightSource,
    rows: Sequence[Row],
    readout: Readout,
    run: Trace,
    groups: Sequence[_Group],
) -> Iterator[tuple[_Group, Float[Tensor, "units items"]]]:
    """Stream the layers once: every group enters at its own layer and goes on to the readout's."""
    states: dict[_Group, list[Tensor]] = {}
    for index in range(groups[0].layer, readout.layer + 1):
        weights = base.layer(index)
        read = [readout.places(row).unique() if index == readout.layer else None for row in rows]
        for held in states.values():
            for number, entry in enumerate(run.entries):
                held[number] = engine.layer(index, weights, held[number], entry.calls[index], places=read[number])
        entering = [group for group in groups if group.layer == index]
        if entering:
            source = expert.layer(index)
            for group in entering:
                states[group] = [_enter(engine, group, weights, source, run, n, read[n]) for n in range(len(rows))]
    outer = base.outer(engine.layout.output_tensors())
    for group, held in states.items():
        values = read_states(engine, outer, rows, readout, held)
        yield group, (values[1:] - values[:1]).double().cpu()


def _enter(
    engine: Engine, group: _Group, weights: Weights, source: Weights, run: Trace, number: int, places: Tensor | None
) -> Float[Tensor, "U T D"]:
    """The residual stream after the units' own layer: first of the untouched copy, then of each unit."""
    index, hidden, call = group.layer, run.hidden[number][group.layer], run.entries[number].calls[group.layer]
    output, taps = engine.layer_with_taps(index, weights, hidden, call)
    if group.units[0].kind == "head":
        terms = _head_terms(engine, group, weights, source, taps)
        terms = torch.cat([torch.zeros_like(terms[:1]), terms])
        copies = hidden.expand(len(terms), -1, -1)
        return engine.layer(index, weights, copies, call, attention_out=taps.attention_out + terms, places=places)
    patched = [output]
    neurons = [unit for unit in group.units if unit.kind == "neuron"]
    if neurons:
        terms = _neuron_terms(engine, index, neurons, weights, source, taps)
        copies = hidden.expand(len(terms), -1, -1)
        written = {"attention_out": taps.attention_out, "mlp_out": taps.mlp_out + terms}
        from_neurons = dict(zip(neurons, engine.layer(index, weights, copies, call, **written), strict=True))
    for unit in group.units:
        if unit.kind == "neuron":
            patched.append(from_neurons[unit][None])
        else:
            pieces = engine.layout.slices(unit)
            mixed = swap(pieces, weights, source, prefix=engine.layout.layer_prefix(index))
            patched.append(engine.layer(index, mixed, hidden, call))
    return torch.cat(patched)


def _head_terms(engine: Engine, group: _Group, weights: Weights, source: Weights, taps: Taps) -> Float[Tensor, "U T D"]:
    """W_O^E z^E − W_O^B z^B per head; where a norm spans heads, the whole attention output's change."""
    layout, index = engine.layout, group.layer
    if layout.arch.norm_spans_heads:
        prefix = layout.layer_prefix(index)
        outputs = [
            engine.attention(index, swap(layout.slices(unit), weights, source, prefix=prefix), taps.attention_call)
            for unit in group.units
        ]
        return torch.cat(outputs) - taps.attention_out
    z = engine.heads(index, swap_kind(layout, "head", index, weights, source), taps.attention_call)
    new = _write_per_head(engine, z, engine.attention_projection(source), group.units)
    return new - _write_per_head(engine, taps.z, engine.attention_projection(weights), group.units)


def _write_per_head(
    engine: Engine, z: Float[Tensor, "1 T H"], projection: Float[Tensor, "D H"], units: Sequence[Unit]
) -> Float[Tensor, "U T D"]:
    size = z.shape[-1] // engine.layout.heads
    spans = [slice(unit.index * size, (unit.index + 1) * size) for unit in units]
    return torch.cat([z[..., span] @ projection[:, span].T for span in spans])


def _neuron_terms(
    engine: Engine, index: int, units: Sequence[Unit], weights: Weights, source: Weights, taps: Taps
) -> Float[Tensor, "U T D"]:
    """W_down^E[:, j] n_j^E − W_down^B[:, j] n_j^B per neuron."""
    n = engine.neurons(index, swap_kind(engine.layout, "neuron", index, weights, source), taps.mlp_in)[0]
    before = taps.n[0]
    new, old = engine.mlp_projection(source), engine.mlp_projection(weights)
    chosen = [unit.index for unit in units]
    write = "tu,du->utd"
    terms = torch.einsum(write, n[:, chosen], new[:, chosen]) - torch.einsum(write, before[:, chosen], old[:, chosen])
    return terms.contiguous()  # a post-norm's reduction rounds by memory layout


def _outer_effect(
    engine: Engine,
    base: WeightSource,
    expert: WeightSource,
    rows: Sequence[Row],
    readout: Readout,
    unit: Unit,
    run: Trace,
) -> Float[Tensor, " items"]:
    """A unit outside the layers: read the base's run again, or, for what enters layer 0, run it all."""
    pieces = engine.layout.slices(unit)
    outer, source = base.outer(engine.layout.output_tensors()), expert.outer([piece.tensor for piece in pieces])
    states = [hidden[-1] for hidden in run.hidden]
    before = read_states(engine, outer, rows, readout, states)[0]
    if unit.kind not in ("embedding", "positions"):
        mixed = swap(pieces, outer, source)
        return (read_states(engine, mixed, rows, readout, states)[0] - before).double().cpu()
    del outer
    after = measure(engine, _Regrafted(base, pieces, source), rows, readout)
    return (after - before).double().cpu()


@dataclass(frozen=True, slots=True)
class _Regrafted:
    """A model with other weights outside its layers."""

    source: WeightSource
    pieces: Sequence[Slice]
    replacement: Weights

    def layer(self, index: int) -> Weights:
        return self.source.layer(index)

    def outer(self, names: Sequence[str] | None = None) -> Weights:
        found = self.source.outer(names)
        return swap([piece for piece in self.pieces if piece.tensor in found], found, self.replacement)
