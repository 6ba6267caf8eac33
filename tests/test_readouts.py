"""Readouts against plain computations on transformers' own models, and their gradients against differences."""

import math

import pytest
import torch
from tiny import CONFIGS, ModelWeights, tiny_model

from wpmerge.engine import Engine
from wpmerge.readouts import (
    AnchorReadout,
    DivergenceReadout,
    LogProbReadout,
    Readout,
    ReplyReadout,
    measure,
    output_gradient,
    read_states,
    reply_readout,
    trace,
)
from wpmerge.rows import pack

SEQUENCES = [[3, 4, 5, 9, 17], [3, 4, 5, 40, 8, 21, 33, 7], [3, 4, 5, 50, 51, 52], [3, 4, 5, 11, 12, 13, 14, 15, 16]]
STARTS = [4, 5, 3, 6]


def pair(model_type: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    one, other = (tiny_model(model_type, seed=seed, dtype=torch.float64) for seed in (0, 1))
    return one, other


def opened(model: torch.nn.Module) -> tuple[Engine, ModelWeights]:
    weights = ModelWeights.of(model)
    return Engine(weights.layout, dtype=torch.float64), weights


def plain_log_probs(model: torch.nn.Module, sequence: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([sequence])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("tokens_per_row", [8, 14, 400])
@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_log_probability_is_the_mean_over_reference_tokens(model_type: str, tokens_per_row: int) -> None:
    model, _ = pair(model_type)
    engine, weights = opened(model)
    readout = LogProbReadout(layer=2, sequences=SEQUENCES, starts=STARTS)
    found = measure(engine, weights, pack(SEQUENCES, tokens_per_row=tokens_per_row), readout)
    for item, (sequence, start) in enumerate(zip(SEQUENCES, STARTS, strict=True)):
        log_probs = plain_log_probs(model, sequence)
        expected = sum(float(log_probs[i - 1, sequence[i]]) for i in range(start, len(sequence))) / (
            len(sequence) - start
        )
        assert float(found[item]) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("layer", [0, 1])
def test_anchor_is_a_signed_projection_of_the_last_token(layer: int) -> None:
    model, _ = pair("gemma2")
    engine, weights = opened(model)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    readout = AnchorReadout(layer=layer, direction=direction, item=[0, 0, 1, 1], sign=[1.0, -1.0, 1.0, -1.0], items=2)
    with torch.no_grad():
        states = [
            model(torch.tensor([s]), output_hidden_states=True).hidden_states[layer + 1][0, -1] for s in SEQUENCES
        ]
    for tokens_per_row in (8, 400):  # a pair's two prompts in different rows, and in one
        found = measure(engine, weights, pack(SEQUENCES, tokens_per_row=tokens_per_row), readout)
        expected = torch.stack([(states[0] - states[1]) @ direction, (states[2] - states[3]) @ direction])
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def divergence(engine: Engine, teacher: ModelWeights) -> DivergenceReadout:
    """The teacher's states at the places before each reference token, by running it."""
    (row,) = pack(SEQUENCES)
    states = trace(engine, teacher, [row], last=2).hidden[0][-1][0]
    held = [states[row.places[n][STARTS[n] - 1 : -1]] for n in range(len(SEQUENCES))]
    return DivergenceReadout(layer=2, sequences=SEQUENCES, starts=STARTS, teacher=held, teacher_outer=teacher.outer())


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neox"])
def test_divergence_is_minus_the_kl_from_the_teacher(model_type: str) -> None:
    model, teacher = pair(model_type)
    engine, weights = opened(model)
    target = ModelWeights.of(teacher)
    readout = divergence(engine, target)
    rows = pack(SEQUENCES, tokens_per_row=14)
    own = measure(engine, target, rows, readout)
    torch.testing.assert_close(own, torch.zeros_like(own), rtol=0, atol=1e-12)
    found = measure(engine, weights, rows, readout)
    assert bool((found < 0).all())
    for item, (sequence, start) in enumerate(zip(SEQUENCES, STARTS, strict=True)):
        p, q = plain_log_probs(teacher, sequence), plain_log_probs(model, sequence)
        kl = [float((p[i].exp() * (p[i] - q[i])).sum()) for i in range(start - 1, len(sequence) - 1)]
        assert float(found[item]) == pytest.approx(-sum(kl) / len(kl), rel=1e-9)


def reply(engine: Engine, expert: ModelWeights) -> ReplyReadout:
    own = LogProbReadout(layer=2, sequences=SEQUENCES, starts=STARTS)
    return reply_readout(engine, expert, pack(SEQUENCES, tokens_per_row=14), own)


@pytest.mark.parametrize("tokens_per_row", [8, 400])
def test_a_reply_is_kept_as_far_as_the_model_lacks_no_nats(tokens_per_row: int) -> None:
    model, expert = pair("llama")
    engine, weights = opened(model)
    target = ModelWeights.of(expert)
    readout = reply(engine, target)
    rows = pack(SEQUENCES, tokens_per_row=tokens_per_row)
    own = measure(engine, target, rows, readout)
    torch.testing.assert_close(own, torch.ones_like(own), rtol=0, atol=1e-12)
    found = measure(engine, weights, rows, readout)
    hidden = 0  # tokens that the model is surer of than the expert
    for item, (sequence, start) in enumerate(zip(SEQUENCES, STARTS, strict=True)):
        places = range(start, len(sequence))
        p, q = plain_log_probs(expert, sequence), plain_log_probs(model, sequence)
        lacking = [float(p[i - 1, sequence[i]] - q[i - 1, sequence[i]]) for i in places]
        hidden += sum(each < 0 for each in lacking)
        surprise = -sum(float(p[i - 1, sequence[i]]) for i in places)
        expected = math.exp(-sum(max(0.0, each) for each in lacking) / (1 + surprise))
        assert float(found[item]) == pytest.approx(expected, rel=1e-9)
    assert hidden > 0


def test_some_of_a_readouts_items_read_as_in_the_whole() -> None:
    model, expert = pair("llama")
    engine, weights = opened(model)
    whole = reply(engine, ModelWeights.of(expert))
    for readout in (whole, whole.own):
        every = measure(engine, weights, pack(SEQUENCES), readout)
        some = measure(engine, weights, pack([SEQUENCES[3], SEQUENCES[1]]), readout.some([3, 1]))
        torch.testing.assert_close(some, every[[3, 1]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["anchor", "reference", "divergence", "reply"])
def test_gradient_is_the_finite_difference(name: str) -> None:
    model, teacher = pair("gpt2")
    engine, weights = opened(model)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    readouts: dict[str, Readout] = {
        "anchor": AnchorReadout(layer=2, direction=direction, item=[0, 0, 1, 1], sign=[1.0, -1.0, 1.0, -1.0], items=2),
        "reference": LogProbReadout(layer=2, sequences=SEQUENCES, starts=STARTS),
        "divergence": divergence(engine, ModelWeights.of(teacher)),
        "reply": reply(engine, ModelWeights.of(teacher)),
    }
    readout, outer = readouts[name], weights.outer()
    rows = pack(SEQUENCES, tokens_per_row=16)
    states = [hidden[-1] for hidden in trace(engine, weights, rows, last=2).hidden]

    def value(moved: list[torch.Tensor]) -> float:
        return float(read_states(engine, outer, rows, readout, moved).mean())

    step = 1e-6
    for number, row in enumerate(rows):
        gradient = output_gradient(engine, outer, row, readout, states[number])
        read = set(readout.places(row).tolist())
        for place in range(row.tokens.shape[1]):
            if place not in read:
                assert not gradient[0, place].any(), "a position that is not read has no gradient"
                continue
            way = torch.randn(16, generator=torch.Generator().manual_seed(place), dtype=torch.float64)
            values = []
            for sign in (1, -1):
                moved = [state.clone() for state in states]
                moved[number][0, place] += sign * step * way
                values.append(value(moved))
            slope = (values[0] - values[1]) / (2 * step)
            assert float(gradient[0, place] @ way) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_a_prefix_position_that_two_items_read_counts_twice() -> None:
    """Two references of one prompt: both first tokens are predicted from the same, shared position."""
    sequences = [[3, 4, 5, 9, 17], [3, 4, 5, 40, 8]]
    model, _ = pair("gpt2")
    engine, weights = opened(model)
    readout = LogProbReadout(layer=2, sequences=sequences, starts=[3, 3])
    (row,) = pack(sequences)
    assert readout.places(row).tolist() == [2, 3, 2, 5]
    state = trace(engine, weights, [row], last=2).hidden[0][-1]
    together = output_gradient(engine, weights.outer(), row, readout, state)[0, 2]
    alone = []
    for sequence in sequences:
        single = LogProbReadout(layer=2, sequences=[sequence], starts=[3])
        (own,) = pack([sequence])
        own_state = trace(engine, weights, [own], last=2).hidden[0][-1]
        alone.append(output_gradient(engine, weights.outer(), own, single, own_state)[0, 2])
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2, rtol=1e-9, atol=1e-12)


def test_copies_are_read_each_for_itself() -> None:
    model, _ = pair("mistral")
    engine, weights = opened(model)
    readout = LogProbReadout(layer=2, sequences=SEQUENCES, starts=STARTS)
    rows = pack(SEQUENCES, tokens_per_row=14)
    states = [hidden[-1] for hidden in trace(engine, weights, rows, last=2).hidden]
    copies = [torch.cat([state, state + 0.1, state]) for state in states]
    found = read_states(engine, weights.outer(), rows, readout, copies)
    assert found.shape == (3, 4)
    assert torch.equal(found[0], measure(engine, weights, rows, readout))
    assert torch.equal(found[0], found[2])
    assert float((found[0] - found[1]).abs().max()) > 1e-4
