"""Gradients along task vectors: against autograd through whole models, and the completeness of their integral."""

from collections.abc import Callable, Mapping

import pytest
import torch
from tiny import CONFIGS, ModelWeights, tiny_model

from wpmerge.arch import Layout, Slice
from wpmerge.engine import Engine
from wpmerge.estimators import completeness
from wpmerge.gradients import Term, directional, directional_sum, integrated, interpolated, state_gradients
from wpmerge.readouts import AnchorReadout, LogProbReadout, Readout, measure, read_states, trace
from wpmerge.rows import pack

SEQUENCES = [[3, 4, 5, 9, 17], [3, 4, 5, 40, 8, 21, 33, 7], [3, 4, 5, 50, 51, 52], [3, 4, 5, 11, 12, 13, 14, 15, 16]]
STARTS = [4, 5, 4, 6]
ITEM, SIGN = [0, 0, 1, 1], [1.0, -1.0, 1.0, -1.0]


def readouts(layout: Layout) -> dict[str, Readout]:
    direction = torch.randn(layout.hidden, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return {
        "anchor": AnchorReadout(layer=1, direction=direction / direction.norm(), item=ITEM, sign=SIGN, items=2),
        "reference": LogProbReadout(layer=2, sequences=SEQUENCES, starts=STARTS),
    }


def whole_model_value(model: torch.nn.Module, readout: Readout) -> torch.Tensor:
    """F by transformers' own model, one sequence at a time, with its graph."""
    total = torch.zeros((), dtype=torch.float64)
    for number, sequence in enumerate(SEQUENCES):
        run = model(torch.tensor([sequence]), output_hidden_states=True)
        if isinstance(readout, AnchorReadout):
            total = total + SIGN[number] * run.hidden_states[readout.layer + 1][0, -1] @ readout.direction
        else:
            log_probs = run.logits[0].log_softmax(-1)
            steps = range(STARTS[number], len(sequence))
            total = total + torch.stack([log_probs[i - 1, sequence[i]] for i in steps]).mean()
    return total / readout.items


def entries(piece: Slice) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
    """What a slice takes of a model's tensors."""

    def part(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tensor = tensors[piece.tensor]
        return tensor if piece.axis is None else tensor.narrow(piece.axis, piece.start, piece.stop - piece.start)

    return part


@pytest.mark.parametrize("reading", ["anchor", "reference"])
@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_directional_is_autograd_through_the_whole_model(model_type: str, reading: str) -> None:
    models = [tiny_model(model_type, seed=seed, dtype=torch.float64) for seed in (0, 1, 2)]
    base, one, two = (ModelWeights.of(model) for model in models)
    layout = base.layout
    readout = readouts(layout)[reading]
    models[0].requires_grad_(True)
    names, parameters = zip(*models[0].named_parameters(), strict=True)
    found = torch.autograd.grad(whole_model_value(models[0], readout), parameters, materialize_grads=True)
    gradient = dict(zip(names, found, strict=True))
    engine = Engine(layout, dtype=torch.float64)
    arrays = directional(engine, base, base, [one, two], pack(SEQUENCES, tokens_per_row=16), readout)
    for expert, by_kind in zip((one, two), arrays, strict=True):
        for kind, array in by_kind.items():
            expected = torch.full_like(array, torch.nan)
            for unit in layout.units(kind):
                if unit.layer <= readout.layer and (readout.reads_output or kind not in ("final_norm", "lm_head")):
                    expected[unit.layer, unit.index] = sum(
                        float((part(gradient) * (part(expert.tensors) - part(base.tensors))).sum())
                        for part in map(entries, layout.slices(unit))
                    )
            largest = float(expected.abs().nan_to_num().max())
            # transformers' root-mean-square norms compute in float32
            torch.testing.assert_close(array, expected, rtol=0, atol=1e-5 * largest, equal_nan=True, msg=kind)
            assert largest > 1e-3 or expected.isnan().all(), kind


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_sum_is_that_of_its_terms_each_with_its_weights(model_type: str) -> None:
    """Three terms, one of which weighs nothing; and one such alone."""
    models = [ModelWeights.of(tiny_model(model_type, seed=seed, dtype=torch.float64)) for seed in (0, 1, 2)]
    base, experts = models[0], models[1:]
    engine = Engine(base.layout, dtype=torch.float64)
    whole = LogProbReadout(layer=2, sequences=SEQUENCES, starts=STARTS)
    parts = [whole.some(items) for items in ([0, 1], [2], [3])]
    seen = []

    def twice_the_square(values: torch.Tensor) -> torch.Tensor:
        seen.append(values)
        return 2.0 * values

    rows = [pack(part.sequences) for part in parts]
    terms = [
        Term(rows=rows[0], readout=parts[0], weigh=twice_the_square),
        Term(rows=rows[1], readout=parts[1]),
        Term(rows=rows[2], readout=parts[2], weigh=lambda _: torch.tensor([3.0])),
        Term(rows=rows[0], readout=parts[0], weigh=torch.zeros_like),
    ]
    sums = directional_sum(engine, base, base, experts, terms)
    nothing = directional_sum(engine, base, base, experts, terms[3:])
    single = [
        directional(engine, base, base, experts, pack([each]), whole.some([n])) for n, each in enumerate(SEQUENCES)
    ]
    torch.testing.assert_close(seen[0], measure(engine, base, rows[0], parts[0]))
    for number in range(len(experts)):
        for kind, array in sums[number].items():
            own = [each[number][kind] for each in single]
            expected = 2.0 * seen[0][0] * own[0] + 2.0 * seen[0][1] * own[1] + own[2] + 3.0 * own[3]
            close = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}  # the models' norms compute in float32
            torch.testing.assert_close(array, expected, **close, msg=kind)
            assert not nothing[number][kind].any(), kind


@pytest.mark.parametrize(
    ("model_type", "reading"), [("llama", "anchor"), ("gemma2", "reference"), ("gpt2", "reference")]
)
def test_integrated_shares_sum_to_the_gap_the_better_the_more_points(model_type: str, reading: str) -> None:
    base, far = (ModelWeights.of(tiny_model(model_type, seed=seed, dtype=torch.float64)) for seed in (0, 1))
    # a tenth of the way: between unrelated random models F is too rough a curve for few points
    near = {name: value + 0.1 * (far.tensors[name] - value) for name, value in base.tensors.items()}
    expert = ModelWeights(base.layout, near)
    engine, rows = Engine(base.layout, dtype=torch.float64), pack(SEQUENCES, tokens_per_row=16)
    readout = readouts(base.layout)[reading]
    gap = float(measure(engine, expert, rows, readout).mean() - measure(engine, base, rows, readout).mean())
    residuals = {}
    for points in (1, 4, 8):
        (shares,) = integrated(engine, base, [expert], rows, readout, points=points)
        residuals[points] = abs(completeness(shares) - gap) / abs(gap)
        for kind, array in shares.items():
            hidden = reading == "anchor" and kind in ("final_norm", "lm_head")
            expected = [hidden] if len(array) == 1 else [False, False, reading == "anchor"]
            assert array.isnan().all(dim=1).tolist() == array.isnan().any(dim=1).tolist() == expected, kind
    assert residuals[4] < 0.2 * residuals[1]
    assert residuals[8] < 0.2 * residuals[4]
    assert residuals[8] < 1e-4


def test_interpolation_starts_at_the_base_and_ends_at_the_expert() -> None:
    base, expert = (ModelWeights.of(tiny_model("phi3", seed=seed)) for seed in (0, 1))
    for alpha, near in ((0.0, base), (1.0, expert)):
        found = interpolated(base.layout, base, expert, alpha)
        assert all(torch.equal(value, near.layer(1)[name]) for name, value in found.layer(1).items())
    quarter = interpolated(base.layout, base, expert, 0.25).outer()["model.norm.weight"]
    expected = 0.75 * base.outer()["model.norm.weight"] + 0.25 * expert.outer()["model.norm.weight"]
    torch.testing.assert_close(quarter, expected)


def test_directional_at_another_point_than_the_base() -> None:
    """The gradient belongs to the point, the task vector to the base."""
    base, expert, point = (ModelWeights.of(tiny_model("gpt2", seed=seed, dtype=torch.float64)) for seed in (0, 1, 2))
    engine, rows = Engine(base.layout, dtype=torch.float64), pack(SEQUENCES)
    readout = readouts(base.layout)["reference"]
    (arrays,) = directional(engine, point, base, [expert], rows, readout)
    step = 1e-6
    values = []
    for sign in (1, -1):
        moved = {
            name: value + sign * step * (expert.tensors[name] - base.tensors[name])
            for name, value in point.tensors.items()
        }
        values.append(float(measure(engine, ModelWeights(base.layout, moved), rows, readout).mean()))
    slope = (values[0] - values[1]) / (2 * step)
    assert sum(float(array.sum()) for array in arrays.values()) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("tokens_per_row", [1, 400])
def test_gradients_of_the_stream_are_differences(tokens_per_row: int) -> None:
    """At each sequence's token, two of them the same prompt with other replies: a nudge there moves F by the slope."""
    base = ModelWeights.of(tiny_model("olmo2", seed=0, dtype=torch.float64))
    engine = Engine(base.layout, dtype=torch.float64)
    sequences, starts = [[3, 4, 5, 9, 17], [3, 4, 5, 40, 8], [3, 7, 21, 33]], [3, 3, 2]
    readout = LogProbReadout(layer=2, sequences=sequences, starts=starts)
    rows = pack(sequences, tokens_per_row=tokens_per_row)
    found = state_gradients(engine, base, rows, readout, [start - 1 for start in starts])
    run = trace(engine, base, rows, last=2)
    nudge = torch.randn(16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for item, start in enumerate(starts):
        (number,) = [n for n, row in enumerate(rows) if item in row.places]
        row, place = rows[number], rows[number].places[item][start - 1]
        for layer in range(2):
            values = []
            for sign in (1, -1):
                hidden = run.hidden[number][layer + 1].clone()
                hidden[0, place] += sign * 1e-4 * nudge
                for index in range(layer + 1, 3):
                    hidden = engine.layer(index, base.layer(index), hidden, run.entries[number].calls[index])
                values.append(float(read_states(engine, base.outer(), [row], readout, [hidden]).mean()))
            sharing = 2 if tokens_per_row == 400 and item < 2 else 1
            slope = (values[0] - values[1]) / 2e-4 / sharing
            assert float(found[item, layer] @ nudge) == pytest.approx(
                slope, rel=1e-2, abs=1e-5
            )  # norms round to float32
