"""Merges made while they run, retention, utility, and the search over scales."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ModelWeights, tiny_model

from wpmerge.calibration import (
    EPSILON,
    PENALTY,
    HeldOutReading,
    Standing,
    Tunable,
    assess,
    merged_source,
    read_held_out,
    retention,
    scale_tunables,
    search_numbers,
    utility,
)
from wpmerge.coefficients import make_grouping, tensor_coefficients
from wpmerge.engine import Engine
from wpmerge.errors import RecipeError
from wpmerge.plan import Coefficient
from wpmerge.readouts import LogProbReadout, measure
from wpmerge.rows import pack

SEQUENCES = [[3, 9, 14, 20, 31, 7], [3, 9, 40, 8, 12], [5, 6, 33, 21, 2, 50, 17]]
STARTS = [3, 2, 4]


def family(model_type: str = "phi3") -> tuple[Engine, ModelWeights, dict[str, ModelWeights]]:
    base, *experts = (ModelWeights.of(tiny_model(model_type, seed=seed)) for seed in range(3))
    return Engine(base.layout), base, {"a": experts[0], "b": experts[1]}


def coefficients(engine: Engine, names: list[str], granularity: str = "unit") -> dict[str, dict[str, Coefficient]]:
    generator = torch.Generator().manual_seed(3)
    grouping = make_grouping(engine.layout, granularity)
    return {
        name: tensor_coefficients(
            engine.layout, grouping, torch.rand(len(grouping.names), generator=generator, dtype=torch.float64)
        )
        for name in names
    }


def common(engine: Engine, scales: dict[str, float]) -> dict[str, dict[str, Coefficient]]:
    return {
        name: {stored: Coefficient(values=torch.tensor(scale)) for stored in engine.layout.stored.values()}
        for name, scale in scales.items()
    }


@pytest.mark.parametrize("model_type", ["phi3", "gpt2", "llama"])
@pytest.mark.parametrize("granularity", ["unit", "tensor"])
def test_a_merged_source_is_base_plus_coefficients_times_deltas(model_type: str, granularity: str) -> None:
    engine, base, experts = family(model_type)
    numbers = coefficients(engine, list(experts), granularity)
    source = merged_source(engine, base, experts, numbers)
    before = {name: value.clone() for name, value in base.tensors.items()}
    merged = dict(source.outer())
    for index in range(3):
        prefix = engine.layout.layer_prefix(index)
        merged |= {prefix + name: value for name, value in source.layer(index).items()}
    assert set(merged) == set(engine.layout.tensors)
    for name, value in merged.items():
        expected = base.tensors[name].double().clone()
        for expert, weights in experts.items():
            factor = numbers[expert][engine.layout.stored[name]]
            spread = factor.values.double()
            if factor.axis == 0:
                spread = spread.reshape(-1, *[1] * (expected.ndim - 1))
            expected += spread * (weights.tensors[name].double() - base.tensors[name].double())
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(base.tensors[name], before[name]), "the base was written to"


def readings(engine: Engine, base: ModelWeights, experts: dict[str, ModelWeights]) -> dict[str, HeldOutReading]:
    readout = LogProbReadout(layer=2, sequences=SEQUENCES, starts=STARTS)
    rows = pack(SEQUENCES, tokens_per_row=12)
    return {name: read_held_out(engine, base, expert, readout, rows) for name, expert in experts.items()}


def log_probability(model: torch.nn.Module) -> float:
    """The readout from transformers' own forward: the mean over sequences of the mean over reference tokens."""
    means = []
    for sequence, start in zip(SEQUENCES, STARTS, strict=True):
        logits = model(torch.tensor([sequence])).logits[0].double()
        chosen = logits.log_softmax(-1)[range(start - 1, len(sequence) - 1), sequence[start:]]
        means.append(float(chosen.mean()))
    return sum(means) / len(means)


@torch.no_grad()
def test_readings_and_retention_are_those_of_the_models() -> None:
    engine, base, experts = family()
    found = readings(engine, base, experts)
    values = [log_probability(tiny_model("phi3", seed=seed)) for seed in range(3)]
    for name, value in zip("ab", values[1:], strict=True):
        assert found[name].base == pytest.approx(values[0], abs=1e-5)
        assert found[name].expert == pytest.approx(value, abs=1e-5)
    model = tiny_model("phi3", seed=0)
    for parameter, one, other in zip(
        model.parameters(),
        tiny_model("phi3", seed=1).parameters(),
        tiny_model("phi3", seed=2).parameters(),
        strict=True,
    ):
        parameter.copy_(0.3 * parameter + 0.5 * one + 0.2 * other)
    merged = merged_source(engine, base, experts, common(engine, {"a": 0.5, "b": 0.2}))
    kept = retention(engine, merged, found)
    value = log_probability(model)
    for name, own in zip("ab", values[1:], strict=True):
        assert kept[name] == pytest.approx((value - values[0]) / (own - values[0]), abs=1e-4)


def test_the_expert_keeps_all_and_the_base_nothing() -> None:
    engine, base, experts = family()
    found = readings(engine, base, experts)
    nothing = merged_source(engine, base, experts, common(engine, {"a": 0.0, "b": 0.0}))
    assert retention(engine, nothing, found) == {"a": 0.0, "b": 0.0}
    for name in experts:
        scales = {"a": 0.0, "b": 0.0, name: 1.0}
        whole = merged_source(engine, base, experts, common(engine, scales))
        assert retention(engine, whole, found)[name] == pytest.approx(1.0, abs=1e-4)


def test_utility_by_hand() -> None:
    assert pytest.approx(0.01) == EPSILON
    assert utility({"a": 0.49, "b": 0.99}) == pytest.approx(math.log(0.5) + math.log(1.0))
    assert utility({"a": 1.7}) == utility({"a": 1.0}) == pytest.approx(math.log(1.01))
    assert utility({"a": -3.0}) == utility({"a": 0.0}) == pytest.approx(math.log(0.01))
    assert utility({"a": math.nan}) == utility({"a": 0.0})
    assert utility({"a": 0.5, "b": 0.5}) > utility({"a": 0.99, "b": 0.05})


# --- the search


def bowl(best: dict[str, float]) -> Callable[[dict[str, float]], dict[str, float]]:
    """Each expert's skill has its peak, 1, at its own scale, and is concave."""
    return lambda scales: {name: 1.0 - (scales[name] - best[name]) ** 2 for name in best}


class Counted:
    """Counts evaluations and checks that none is repeated."""

    def __init__(self, evaluate: Callable[[dict[str, float]], dict[str, float]]) -> None:
        self.evaluate, self.seen = evaluate, []

    def __call__(self, scales: dict[str, float]) -> dict[str, float]:
        assert scales not in self.seen
        self.seen.append(dict(scales))
        return self.evaluate(scales)


def search_scales(
    experts: list[str], evaluate: Any, *, evaluations: int, together: bool, highest: float
) -> tuple[dict[str, float], dict[str, float]]:
    """As the rules search scales: for the largest utility."""
    numbers = scale_tunables(experts, together=together, highest=highest)
    return search_numbers(dict.fromkeys(experts, 0.0), numbers, evaluate, utility, evaluations=evaluations)


@pytest.mark.parametrize(
    "best", [{"a": 0.5, "b": 0.9}, {"a": 0.15, "b": 1.2, "c": 0.65}, {"a": 0.0, "b": 1.5}, {"a": 0.85}]
)
def test_a_concave_optimum_on_the_grid_is_found(best: dict[str, float]) -> None:
    evaluate = Counted(bowl(best))
    found, kept = search_scales(list(best), evaluate, evaluations=120, together=False, highest=1.5)
    assert found == pytest.approx(best)
    assert kept == pytest.approx(dict.fromkeys(best, 1.0))
    assert len(evaluate.seen) < 60


@given(
    st.lists(st.floats(0.0, 1.5), min_size=1, max_size=4),
    st.integers(1, 40),
    st.booleans(),
    st.floats(0.05, 2.0),
)
def test_the_search_keeps_to_its_means(best: list[float], evaluations: int, together: bool, highest: float) -> None:
    names = [f"e{n}" for n in range(len(best))]
    evaluate = Counted(bowl(dict(zip(names, best, strict=True))))
    found, kept = search_scales(names, evaluate, evaluations=evaluations, together=together, highest=highest)
    assert 1 <= len(evaluate.seen) <= evaluations
    assert all(0.0 <= scale <= highest + 1e-6 for scales in evaluate.seen for scale in scales.values())
    if together:
        assert all(len(set(scales.values())) == 1 for scales in evaluate.seen)
    assert found in evaluate.seen
    assert kept == evaluate.evaluate(found)
    assert utility(kept) == max(utility(evaluate.evaluate(scales)) for scales in evaluate.seen)


@given(st.floats(0.0, 1.5), st.floats(0.0, 1.5))
def test_the_search_ends_within_its_finest_step(one: float, other: float) -> None:
    best = {"a": one, "b": other}
    found, _ = search_scales(list(best), bowl(best), evaluations=200, together=False, highest=1.5)
    assert found == pytest.approx(best, abs=0.025 + 1e-6)


def test_together_finds_the_best_common_scale() -> None:
    """Peaks at .3 and .9: the common optimum of the two logarithms lies half-way, .6."""
    evaluate = Counted(bowl({"a": 0.3, "b": 0.9}))
    found, _ = search_scales(["a", "b"], evaluate, evaluations=50, together=True, highest=1.5)
    assert found == pytest.approx({"a": 0.6, "b": 0.6})


def test_scales_stay_below_the_largest_coefficient() -> None:
    evaluate = Counted(bowl({"a": 1.2, "b": 1.2}))
    found, _ = search_scales(["a", "b"], evaluate, evaluations=50, together=False, highest=0.4)
    assert found == {"a": 0.4, "b": 0.4}
    assert max(max(scales.values()) for scales in evaluate.seen) == 0.4


def test_no_evaluation_is_no_search() -> None:
    with pytest.raises(RecipeError, match="at least one evaluation"):
        search_scales(["a"], bowl({"a": 0.5}), evaluations=0, together=False, highest=1.5)
    found, _ = search_scales(["a"], bowl({"a": 0.9}), evaluations=1, together=False, highest=1.5)
    assert found == {"a": 0.3}, "the first of the grid is all that was seen"


# --- retain sets, and searches over other numbers


def test_a_retain_set_is_read_as_nats_below_the_base() -> None:
    engine, base, experts = family()
    found = readings(engine, base, experts)
    readout, rows = found["a"].readout, found["a"].rows
    plain = read_held_out(engine, base, None, readout, rows)
    assert plain.retain and plain.expert == plain.base
    assert not found["a"].retain
    whole = merged_source(engine, base, experts, common(engine, {"a": 1.0, "b": 0.0}))
    standing = assess(engine, whole, {**found, "plain": plain})
    assert set(standing.kept) == {"a", "b"} and set(standing.lost) == {"plain"}
    assert standing.lost["plain"] == pytest.approx(found["a"].base - found["a"].expert, abs=1e-5)
    assert standing.kept == retention(engine, whole, {**found, "plain": plain})
    changes = measure(engine, whole, rows, readout).double() - plain.base_items
    assert standing.errors == {
        "plain": pytest.approx(statistics.stdev(changes.tolist()) / len(changes) ** 0.5, abs=1e-6)
    }
    again = Standing.of(standing.arrays(), [*found, "plain"])
    assert again == standing


def test_one_question_alone_says_nothing_of_an_error() -> None:
    engine, base, experts = family()
    readout = LogProbReadout(layer=2, sequences=SEQUENCES[:1], starts=STARTS[:1])
    plain = read_held_out(engine, base, None, readout, pack(SEQUENCES[:1]))
    half = merged_source(engine, base, experts, common(engine, {"a": 0.5, "b": 0.0}))
    assert assess(engine, half, {"plain": plain}).errors == {"plain": 0.0}


def test_all_readings_of_one_run_are_those_of_runs_apart() -> None:
    engine, base, experts = family()
    found = readings(engine, base, experts)
    sequences, starts = [[4, 8, 15, 16, 23], [42, 8]], [2, 1]
    other = LogProbReadout(layer=2, sequences=sequences, starts=starts)
    found["c"] = read_held_out(engine, base, experts["b"], other, pack(sequences))
    merged = merged_source(engine, base, experts, common(engine, {"a": 0.4, "b": 0.3}))
    together = assess(engine, merged, found).kept
    for name, reading in found.items():
        assert assess(engine, merged, {name: reading}).kept[name] == pytest.approx(together[name], abs=1e-9)


def test_what_a_retain_set_loses_costs_beyond_the_tolerance() -> None:
    kept = {"a": 0.49}
    free = utility(kept)
    assert Standing(kept=kept, lost={"p": 0.02}).worth() == free
    assert Standing(kept=kept, lost={"p": -1.0}).worth() == free
    assert Standing(kept=kept, lost={"p": 0.03, "q": 0.01}).worth() == pytest.approx(free - 0.5 * PENALTY)
    assert Standing(kept=kept, lost={"p": 0.03, "q": 0.03}).worth(0.015) == pytest.approx(free - 2 * PENALTY)
    unsure = Standing(kept=kept, lost={"p": 0.01, "q": -0.05}, errors={"p": 0.03, "q": 0.06})
    assert unsure.worth() == pytest.approx(free - PENALTY), "p may have lost two tolerances, q half a one"


def test_a_searchs_own_numbers_come_after_the_scales_they_belong_to() -> None:
    """x has its optimum at .7, p at .25, y at 1.3; the grid of p is tried at the best x."""
    best = {"x": 0.7, "y": 1.3, "p": 0.25}
    tunables = [
        Tunable(names=("x", "y"), high=1.5, grid=(0.3, 0.7, 0.9), steps=()),
        Tunable(names=("p",), high=4.0, grid=(0.25, 0.5, 1.0)),
        Tunable(names=("y",), high=1.5),
    ]
    seen = []

    def evaluate(point: dict[str, float]) -> float:
        seen.append(point)
        return -sum((point[name] - best[name]) ** 2 for name in best)

    found, value = search_numbers({"x": 0.5, "y": 0.5, "p": 0.5}, tunables, evaluate, lambda each: each, evaluations=99)
    assert found["p"] == 0.25 and found["y"] == pytest.approx(1.3, abs=0.025)
    assert value == evaluate(found)
    assert [point["p"] for point in seen[:3]] == [0.5] * 3
    assert {point["p"] for point in seen[3:5]} == {0.25, 1.0}  # .5 was seen already


def test_steps_by_a_factor_stay_in_range() -> None:
    mu = Tunable(names=("mu",), low=0.1, high=8.0, steps=(1.0,), factor=True)
    assert mu.moved({"mu": 1.0, "x": 3.0}, 1.0) == {"mu": 2.0, "x": 3.0}
    assert mu.moved({"mu": 1.0}, -1.0) == {"mu": 0.5}
    assert mu.moved({"mu": 6.0}, 1.0) == {"mu": 8.0} and mu.moved({"mu": 0.1}, -1.0) == {"mu": 0.1}
    found, _ = search_numbers(
        {"mu": 1.0}, [mu], lambda point: -abs(math.log2(point["mu"]) - 2), lambda each: each, evaluations=20
    )
    assert found == {"mu": 4.0}


def test_numbers_that_are_all_given_are_evaluated_once() -> None:
    found, value = search_numbers({"x": 0.4}, [], lambda point: point["x"], lambda each: each, evaluations=5)
    assert (found, value) == ({"x": 0.4}, 0.4)
