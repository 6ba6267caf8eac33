"""Exact patching against its definition: swap the weights in transformers' own model, run everything, read."""

import math

import pytest
import torch
from tiny import CONFIGS, ModelWeights, tiny_model

from wpmerge.arch import COARSE_KINDS, Layout, Unit
from wpmerge.engine import Engine
from wpmerge.patching import exact
from wpmerge.readouts import AnchorReadout, LogProbReadout, Readout, measure
from wpmerge.rows import pack

SEQUENCES = [[3, 4, 5, 9, 17], [3, 4, 5, 40, 8, 21, 33, 7], [3, 4, 5, 50, 51, 52], [3, 4, 5, 11, 12, 13, 14, 15, 16]]


def make_readouts(layout: Layout, dtype: torch.dtype) -> dict[str, Readout]:
    direction = torch.randn(layout.hidden, generator=torch.Generator().manual_seed(5), dtype=dtype)
    anchor = AnchorReadout(
        layer=1, direction=direction / direction.norm(), item=[0, 0, 1, 1], sign=[1.0, -1.0, 1.0, -1.0], items=2
    )
    reference = LogProbReadout(layer=layout.layers - 1, sequences=SEQUENCES, starts=[4, 5, 4, 6])
    return {"anchor": anchor, "reference": reference}


@torch.no_grad()
def naive_value(model: torch.nn.Module, readout: Readout) -> float:
    """F by transformers' own model, one unpadded sequence at a time."""
    total = 0.0
    for number, sequence in enumerate(SEQUENCES):
        run = model(torch.tensor([sequence]), output_hidden_states=True)
        if isinstance(readout, AnchorReadout):
            state = run.hidden_states[readout.layer + 1][0, -1]
            total += readout.sign[number] * float(state @ readout.direction)
        else:
            start = readout.starts[number]
            log_probs = run.logits[0].log_softmax(-1)
            picked = [log_probs[i - 1, sequence[i]] for i in range(start, len(sequence))]
            total += float(torch.stack(picked).mean())
    return total / readout.items


@torch.no_grad()
def swapped_value(
    base: torch.nn.Module, expert: torch.nn.Module, layout: Layout, unit: Unit, readout: Readout
) -> float:
    """F with one unit's weights from the expert; the base is as before afterwards."""
    kept = {name: value.clone() for name, value in base.named_parameters()}
    source = dict(expert.named_parameters())
    for piece in layout.slices(unit):
        target = dict(base.named_parameters())[piece.tensor]
        if piece.axis is None:
            target.copy_(source[piece.tensor])
        else:
            span = piece.stop - piece.start
            part = source[piece.tensor].narrow(piece.axis, piece.start, span)
            target.narrow(piece.axis, piece.start, span).copy_(part)
    after = naive_value(base, readout)
    for name, value in base.named_parameters():
        value.copy_(kept[name])
    return after


def expert_with_gap(model_type: str, base: torch.nn.Module, readout: Readout, dtype: torch.dtype) -> torch.nn.Module:
    """The first random expert whose gap is not near 0: the tolerances are fractions of it."""
    experts = (tiny_model(model_type, seed=seed, dtype=dtype) for seed in range(1, 20))
    before = naive_value(base, readout)
    return next(expert for expert in experts if abs(naive_value(expert, readout) - before) > 0.3)


def some_units(layout: Layout) -> list[Unit]:
    """Every unit of every kind, but of the neurons every fifth."""
    units = [unit for kind in (*layout.counts, *COARSE_KINDS) for unit in layout.units(kind)]
    return [unit for unit in units if unit.kind != "neuron" or unit.index % 5 == 0]


@pytest.mark.parametrize("reading", ["anchor", "reference"])
@pytest.mark.parametrize("model_type", list(CONFIGS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_exact_is_naive_swap_and_rerun(model_type: str, reading: str, dtype: torch.dtype, tolerance: float) -> None:
    base = tiny_model(model_type, seed=0, dtype=dtype)
    weights = ModelWeights.of(base)
    layout = weights.layout
    engine = Engine(layout, dtype=dtype)
    readout = make_readouts(layout, dtype)[reading]
    expert = expert_with_gap(model_type, base, readout, dtype)
    rows = pack(SEQUENCES, tokens_per_row=16)
    units = some_units(layout)
    if dtype == torch.float32:
        units = units[::4]
    effects = exact(engine, weights, ModelWeights.of(expert), rows, readout, units, batch_tokens=70).mean(dim=1)
    before = naive_value(base, readout)
    gap = abs(naive_value(expert, readout) - before)
    assert abs(float(measure(engine, weights, rows, readout).mean()) - before) < tolerance * gap
    for unit, effect in zip(units, effects.tolist(), strict=True):
        invisible = unit.layer > readout.layer or (unit.kind in ("final_norm", "lm_head") and not readout.reads_output)
        if invisible:
            assert math.isnan(effect), f"{unit} has no score under this readout, and so NaN"
        else:
            after = swapped_value(base, expert, layout, unit, readout)
            assert abs(effect - (after - before)) <= tolerance * gap, str(unit)


def test_batches_passes_and_packing_do_not_matter() -> None:
    base, expert = (ModelWeights.of(tiny_model("llama", seed=seed)) for seed in (0, 3))
    engine, layout = Engine(base.layout), base.layout
    readout = make_readouts(layout, torch.float32)["reference"]
    units = some_units(layout)
    one = exact(engine, base, expert, pack(SEQUENCES, tokens_per_row=9), readout, units, batch_tokens=1, held_bytes=1)
    other = exact(engine, base, expert, pack(SEQUENCES), readout, units[::-1]).flip(0)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
