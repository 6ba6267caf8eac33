"""Linear weight patching: every unit at once from one backward run (docs/method.md, section "Estimators").

Shape suffixes: U copies (always 1 here), T tokens of a row, D residual width, H attention inputs to W_O, I neurons.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.arch import COARSE_KINDS, KINDS, MODEL_KINDS, Kind, Layout, Unit
from wpmerge.engine import Call, Engine, Taps
from wpmerge.pieces import Forget, Keeper
from wpmerge.readouts import Readout, Trace, output_gradient, read_states, trace
from wpmerge.rows import Row
from wpmerge.weights import Weights, WeightSource, differs, swap, swap_kind

UnitArrays = dict[Kind, Float[Tensor, "layers units"]]
"""One float64 number per unit of each kind, NaN where a readout cannot see the unit."""


def empty_arrays(layout: Layout, kinds: Sequence[Kind] = KINDS) -> UnitArrays:
    """Arrays of NaN for those of ``kinds`` that the model has."""
    present = [kind for kind in kinds if kind in COARSE_KINDS or kind in layout.counts]
    return {kind: torch.full(layout.shape(kind), torch.nan, dtype=torch.float64) for kind in present}


@dataclass(slots=True, kw_only=True)
class _Local:
    """A layer's base run on one row with the gradients of F there."""

    index: int
    hidden: Tensor
    call: Call
    output: Tensor
    taps: Taps
    g_output: Tensor
    g_input: Tensor
    g_attention: Tensor
    g_mlp: Tensor
    g_z: Tensor
    g_n: Tensor


@torch.no_grad()
def linear(
    engine: Engine,
    base: WeightSource,
    experts: Sequence[WeightSource],
    rows: Sequence[Row],
    readout: Readout,
    *,
    kinds: Sequence[Kind] = KINDS,
    keeper: Keeper | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[UnitArrays]:
    """Estimate F(base with u from an expert) − F(base) for every unit u, all experts from one backward run.

    A unit's own computation is really run with the expert's weights (softmax and gating included); what it adds to the
    residual stream is contracted with ∂F there. Heads and neurons: at the output projections. Key/value groups: at the
    heads' outputs. Norms, output biases and coarse units: at the layer's output. The embedding: at its output, and a
    tied head by replacing it. Final norm and head are replaced, so for them the estimate is exact.

    Args:
        engine: runs the layers.
        base: the weights that are patched.
        experts: where units come from.
        rows: the readout's prompts.
        readout: F.
        kinds: which unit kinds to score; kinds that the model lacks are left out.
        keeper: keeps each finished layer, and the gradient that the next one needs.
        progress: called with the number of units just finished.

    Returns:
        For each expert the raw effects, in the readout's own unit; NaN for units that the readout cannot see.
    """
    keeper, last = keeper or Forget(), readout.layer
    effects = [empty_arrays(engine.layout, kinds) for _ in experts]
    inner = [kind for kind in effects[0] if kind not in MODEL_KINDS] if effects else []
    state = keeper.get("gradient")
    reached = int(state["layer"]) if state is not None else last + 1
    run = trace(engine, base, rows, last=last if state is None else reached - 1)
    if state is None:
        gradients = _read_output(engine, base, experts, rows, readout, run, effects)
        keeper.put("outer", _named(effects, MODEL_KINDS))
    else:
        gradients = [state[str(number)].to(engine.device) for number in range(len(rows))]
        _take(effects, keeper.get("outer"))
    for index in reversed(range(last + 1)):
        if index >= reached:
            _take(effects, keeper.get(f"layer-{index}"), index)
        else:
            gradients = _layer_effects(engine, index, base, experts, run, gradients, inner, effects)
            keeper.put(f"layer-{index}", _named(effects, inner, index))
            parts = {str(number): gradient for number, gradient in enumerate(gradients)}
            keeper.put("gradient", {"layer": torch.tensor(index), **parts})
        if progress is not None:
            progress(sum(engine.layout.shape(kind)[1] for kind in inner) * len(experts))
    _input_effects(engine, base, experts, rows, gradients, run, effects)
    return effects


def _named(effects: Sequence[UnitArrays], kinds: Sequence[Kind], index: int | None = None) -> dict[str, Tensor]:
    """All experts' arrays of some kinds, or their rows of one layer, under names for a keeper."""
    return {
        f"{number}/{kind}": arrays[kind] if index is None else arrays[kind][index]
        for number, arrays in enumerate(effects)
        for kind in kinds
        if kind in arrays
    }


def _take(effects: Sequence[UnitArrays], kept: dict[str, Tensor] | None, index: int | None = None) -> None:
    """Put back what :func:`_named` took."""
    assert kept is not None, "what the gradient has passed was kept before it"
    for name, value in kept.items():
        number, kind = name.split("/")
        arrays = effects[int(number)]
        if index is None:
            arrays[kind] = value  # type: ignore[index]
        else:
            arrays[kind][index] = value  # type: ignore[index]


def _layer_effects(
    engine: Engine,
    index: int,
    base: WeightSource,
    experts: Sequence[WeightSource],
    run: Trace,
    gradients: Sequence[Tensor],
    kinds: Sequence[Kind],
    effects: Sequence[UnitArrays],
) -> list[Tensor]:
    """Score one layer's units for every expert, one expert's weights at a time; the gradients at the layer's input."""
    weights = base.layer(index)
    local = [
        _backward(engine, index, weights, hidden[index], entry.calls[index], gradient)
        for hidden, entry, gradient in zip(run.hidden, run.entries, gradients, strict=True)
    ]
    for hidden in run.hidden:
        hidden.pop()  # what lies above is no longer needed
    for arrays, expert in zip(effects, experts, strict=True):
        patched = expert.layer(index)
        for kind in kinds:
            arrays[kind][index] = 0.0
            for row in local:
                arrays[kind][index] += _kind_effects(engine, kind, weights, patched, row).to(arrays[kind])
    return [row.g_input for row in local]


def _backward(engine: Engine, index: int, weights: Weights, hidden: Tensor, call: Call, gradient: Tensor) -> _Local:
    """Run one layer again with a graph, and take F's gradient from its output to its input and its blocks."""
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        output, taps = engine.layer_with_taps(index, weights, leaf, call)
        wanted = (leaf, taps.attention_out, taps.mlp_out, taps.z, taps.n)
        g_input, g_attention, g_mlp, g_z, g_n = torch.autograd.grad(output, wanted, gradient)
    args, kwargs = taps.attention_call
    taps.attention_call = (
        tuple(_detached(value) for value in args),
        {name: _detached(value) for name, value in kwargs.items()},
    )
    for name in ("z", "attention_out", "mlp_in", "n", "mlp_out"):
        setattr(taps, name, getattr(taps, name).detach())
    return _Local(
        index=index,
        hidden=hidden,
        call=call,
        output=output.detach(),
        taps=taps,
        g_output=gradient,
        g_input=g_input,
        g_attention=g_attention,
        g_mlp=g_mlp,
        g_z=g_z,
        g_n=g_n,
    )


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value


def _kind_effects(
    engine: Engine, kind: Kind, weights: Weights, patched: Weights, local: _Local
) -> Float[Tensor, " units"]:
    if engine.layout.arch.norm_spans_heads and kind in ("head", "kv_group"):
        return _attention_unit_effects(engine, kind, weights, patched, local)
    if kind == "head":
        return _head_effects(engine, weights, patched, local)
    if kind == "neuron":
        return _neuron_effects(engine, weights, patched, local)
    if kind == "kv_group":
        return _kv_group_effects(engine, weights, patched, local)
    return _layer_output_effects(engine, kind, weights, patched, local)


def _head_effects(engine: Engine, weights: Weights, patched: Weights, local: _Local) -> Float[Tensor, " heads"]:
    """⟨g, W_O^E z^E − W_O^B z^B⟩ per head, z^E from the expert's W_Q on the base's input, keys and values."""
    mixed = swap_kind(engine.layout, "head", local.index, weights, patched)
    z = engine.heads(local.index, mixed, local.taps.attention_call)
    inputs = (local.g_attention @ engine.attention_projection(patched)) * z - local.g_z * local.taps.z
    return inputs.sum(dim=(0, 1)).view(engine.layout.heads, -1).sum(dim=1)


def _neuron_effects(engine: Engine, weights: Weights, patched: Weights, local: _Local) -> Float[Tensor, " I"]:
    """⟨g, W_down^E n^E − W_down^B n^B⟩ per neuron, n^E from the expert's gate and up rows on the base's input."""
    mixed = swap_kind(engine.layout, "neuron", local.index, weights, patched)
    n = engine.neurons(local.index, mixed, local.taps.mlp_in)
    return ((local.g_mlp @ engine.mlp_projection(patched)) * n - local.g_n * local.taps.n).sum(dim=(0, 1))


def _kv_group_effects(engine: Engine, weights: Weights, patched: Weights, local: _Local) -> Float[Tensor, " groups"]:
    """The heads' outputs with the expert's keys and values, minus the base's, summed over each group's heads."""
    mixed = swap_kind(engine.layout, "kv_group", local.index, weights, patched)
    z = engine.heads(local.index, mixed, local.taps.attention_call)
    return (local.g_z * (z - local.taps.z)).sum(dim=(0, 1)).view(engine.layout.kv_groups, -1).sum(dim=1)


def _attention_unit_effects(
    engine: Engine, kind: Kind, weights: Weights, patched: Weights, local: _Local
) -> Float[Tensor, " units"]:
    """The whole attention output with one unit swapped, unit by unit: where a norm spans heads, each moves all."""
    layout, prefix = engine.layout, engine.layout.layer_prefix(local.index)
    effects = []
    for i in range(layout.counts[kind]):
        pieces = layout.slices(Unit(kind=kind, layer=local.index, index=i))
        mixed = swap(pieces, weights, patched, prefix=prefix)
        output = engine.attention(local.index, mixed, local.taps.attention_call)
        effects.append((local.g_attention * (output - local.taps.attention_out)).sum())
    return torch.stack(effects)


def _layer_output_effects(
    engine: Engine, kind: Kind, weights: Weights, patched: Weights, local: _Local
) -> Float[Tensor, " units"]:
    """The layer run with one unit swapped, its output's change contracted with ∂F there."""
    layout, prefix = engine.layout, engine.layout.layer_prefix(local.index)
    effects = []
    for i in range(layout.shape(kind)[1]):
        pieces = layout.slices(Unit(kind=kind, layer=local.index, index=i))
        if not differs(pieces, weights, patched, prefix=prefix):
            effects.append(local.g_output.new_zeros(()))
            continue
        mixed = swap(pieces, weights, patched, prefix=prefix)
        output = engine.layer(local.index, mixed, local.hidden, local.call)
        effects.append((local.g_output * (output - local.output)).sum())
    return torch.stack(effects)


def _read_output(
    engine: Engine,
    base: WeightSource,
    experts: Sequence[WeightSource],
    rows: Sequence[Row],
    readout: Readout,
    run: Trace,
    effects: Sequence[UnitArrays],
) -> list[Tensor]:
    """∂F at each row's last residual stream; and, where the readout reaches them, replace final norm and head.

    A tied embedding's part as the head is among them. What stands outside the layers is let go on return.
    """
    layout = engine.layout
    outer = base.outer(layout.output_tensors())
    states = [hidden[-1] for hidden in run.hidden]
    gradients = [output_gradient(engine, outer, row, readout, hidden) for row, hidden in zip(rows, states, strict=True)]
    before: Tensor | None = None
    for arrays, expert in zip(effects, experts, strict=True):
        reached = (
            [kind for kind in ("final_norm", "lm_head", "embedding") if kind in arrays] if readout.reads_output else []
        )
        source = expert.outer(layout.output_tensors()) if reached else {}
        for kind in reached:
            if kind == "embedding" and not layout.tied:
                continue
            pieces = layout.slices(Unit(kind=kind, layer=0, index=0))
            arrays[kind][0, 0] = 0.0
            if differs(pieces, outer, source):
                if before is None:
                    before = read_states(engine, outer, rows, readout, states)
                after = read_states(engine, swap(pieces, outer, source), rows, readout, states)
                arrays[kind][0, 0] = (after - before).double().mean()
        del source  # before the next expert's is read
    return gradients


def _input_effects(
    engine: Engine,
    base: WeightSource,
    experts: Sequence[WeightSource],
    rows: Sequence[Row],
    gradients: Sequence[Tensor],
    run: Trace,
    effects: Sequence[UnitArrays],
) -> None:
    """Embedding and positions: their output's change contracted with ∂F at layer 0."""
    outer = base.outer(engine.layout.input_tensors())
    for arrays, expert in zip(effects, experts, strict=True):
        source = expert.outer(engine.layout.input_tensors())
        for kind in ("embedding", "positions"):
            if kind not in arrays:
                continue
            mixed = swap(engine.layout.slices(Unit(kind=kind, layer=0, index=0)), outer, source)
            change = sum(
                float((gradient * (engine.embed(mixed, row).hidden - entry.hidden)).sum())
                for row, gradient, entry in zip(rows, gradients, run.entries, strict=True)
            )
            arrays[kind] = torch.nan_to_num(arrays[kind]) + change
        del source  # before the next expert's is read
