"""Screening: which units are verified, and what is said about those that are not."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ModelWeights, tiny_model

from wpmerge.arch import Layout, Unit
from wpmerge.attribution import linear
from wpmerge.engine import Engine
from wpmerge.patching import exact
from wpmerge.readouts import AnchorReadout, LogProbReadout, measure
from wpmerge.rows import pack
from wpmerge.scores import Verified
from wpmerge.screening import choose_units, summarise, verify

LAYOUT = ModelWeights.of(tiny_model("mistral", seed=0)).layout
SEQUENCES = [[3, 4, 5, 9, 17], [3, 4, 5, 40, 8, 21, 33, 7], [3, 4, 5, 50, 51, 52], [3, 4, 5, 11, 12, 13, 14, 15, 16]]


def head(layer: int, index: int) -> Unit:
    return Unit(kind="head", layer=layer, index=index)


def test_the_top_is_by_size_whatever_the_sign() -> None:
    screen = torch.tensor([[0.1, -0.9, 0.2, 0.0], [0.5, 0.3, -0.4, 0.05], [0.01, 0.02, 0.03, 0.04]])
    found = choose_units(LAYOUT, "head", screen, top=3, sample=0, seed=0)
    assert found == [(head(0, 1), "top"), (head(1, 0), "top"), (head(1, 2), "top")]


@given(
    st.lists(st.one_of(st.floats(-1, 1), st.just(math.nan)), min_size=12, max_size=12),
    st.integers(0, 14),
    st.integers(0, 14),
    st.integers(0, 3),
)
def test_choosing(values: list[float], top: int, sample: int, seed: int) -> None:
    screen = torch.tensor(values, dtype=torch.float64).view(3, 4)
    found = choose_units(LAYOUT, "head", screen, top=top, sample=sample, seed=seed)
    units = [unit for unit, _ in found]
    assert len(set(units)) == len(units)
    sizes = {unit: abs(float(screen[unit.layer, unit.index])) for unit in LAYOUT.units("head")}
    scored = [unit for unit, size in sizes.items() if not math.isnan(size)]
    assert set(units) <= set(scored), "NaN never"
    best = [unit for unit, drawn in found if drawn == "top"]
    drawn = [unit for unit, drawn in found if drawn == "random"]
    assert len(best) == min(top, len(scored))
    assert len(drawn) == min(sample, len(scored) - len(best))
    if best:
        assert min(sizes[unit] for unit in best) >= max((sizes[u] for u in scored if u not in best), default=0)
    assert found == choose_units(LAYOUT, "head", screen, top=top, sample=sample, seed=seed)


def test_the_sample_is_drawn_anew_for_each_seed_and_evenly() -> None:
    screen = torch.zeros(3, 32)
    draws = [choose_units(LAYOUT, "neuron", screen, top=0, sample=24, seed=seed) for seed in range(60)]
    assert len({tuple(draw) for draw in draws}) == 60
    counts = torch.zeros(3, 32)
    for draw in draws:
        for unit, _ in draw:
            counts[unit.layer, unit.index] += 1
    # each neuron is drawn a quarter of the time: 15 of 60, standard deviation 3.4
    assert 3 <= float(counts.min()) < 15 < float(counts.max()) <= 30
    assert draws[0] != choose_units(LAYOUT, "neuron", screen, top=0, sample=24, seed=99)


def verified(drawn: str, screen: float, effect: float) -> Verified:
    return Verified(unit="head.0.0", drawn=drawn, screen=screen, exact=effect, stderr=0.0)


def test_a_summary_by_hand() -> None:
    units = [
        verified("top", 0.9, -0.8),
        verified("top", -0.7, 0.1),
        verified("random", 0.3, 0.5),
        verified("random", 0.2, 0.2),
        verified("random", 0.1, 0.05),
    ]
    found = summarise(units, unverified=100)
    # by |exact|: 0.8 (top), 0.5 (random) are the two strongest, and one of them was in the screen's top two
    assert found.recall == 0.5
    # ranks of screen 5 1 4 3 2, of exact 1 3 5 4 2: Σd² = 16 + 4 + 1 + 1 + 0; 1 − 6·22 / (5·24)
    assert found.spearman == pytest.approx(1 - 6 * 22 / 120)
    assert found.spearman_random == pytest.approx(1.0)
    assert found.largest_error == pytest.approx(0.2)
    # the second strongest has 0.5, and none of the three drawn exceeds it: 1 − 0.05^(1/3)
    assert found.missed_share == pytest.approx(1 - 0.05 ** (1 / 3))
    assert found.units == tuple(units)


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (0, 20), (1, 20), (3, 10), (9, 10)])
def test_the_bound_on_what_was_missed_is_clopper_and_pearsons(hits: int, trials: int) -> None:
    """At the bound, as few hits as were seen have a probability of 0.05: summed from the binomial itself."""
    top = [verified("top", 2.0, 1.0)] * (hits + 1)
    # hits draws are stronger than the weakest of the K strongest: K = hits + 1, so that one of the top stays among them
    draw = [verified("random", 0.0, 2.0 + n) for n in range(hits)] + [verified("random", 0.0, 0.1)] * (trials - hits)
    bound = summarise([*top, *draw], unverified=1000).missed_share
    assert bound is not None
    tail = sum(math.comb(trials, k) * bound**k * (1 - bound) ** (trials - k) for k in range(hits + 1))
    assert tail == pytest.approx(0.05, rel=1e-6)


def test_what_cannot_be_said_is_not_said() -> None:
    top = [verified("top", 0.3, 0.3), verified("top", 0.2, 0.2), verified("top", 0.1, 0.1)]
    nothing_drawn = summarise(top, unverified=0)
    assert (nothing_drawn.spearman_random, nothing_drawn.largest_error, nothing_drawn.missed_share) == (None,) * 3
    assert nothing_drawn.recall == 1.0
    assert nothing_drawn.spearman == pytest.approx(1)
    all_done = summarise([*top, verified("random", 0.0, 0.0)], unverified=0)
    assert all_done.missed_share is None, "nothing is left that could have been missed"
    flat = summarise([verified("random", 0.1, 0.0)] * 4, unverified=3)
    assert (flat.spearman, flat.spearman_random) == (None, None), "no ranks among equals"


@pytest.fixture(scope="module")
def models() -> tuple[Engine, ModelWeights, ModelWeights]:
    base, expert = (ModelWeights.of(tiny_model("mistral", seed=seed)) for seed in (0, 3))
    return Engine(base.layout), base, expert


def test_verification_is_exact_patching(models: tuple[Engine, ModelWeights, ModelWeights]) -> None:
    engine, base, expert = models
    readout = LogProbReadout(layer=2, sequences=SEQUENCES, starts=[4, 5, 4, 6])
    rows = pack(SEQUENCES, tokens_per_row=16)
    gap = float(measure(engine, expert, rows, readout).mean() - measure(engine, base, rows, readout).mean())
    told: list[tuple[int, int]] = []
    found, noise = verify(
        engine,
        base,
        expert,
        rows,
        readout,
        stored=linear(engine, base, [expert], rows, readout)[0],
        gap=gap,
        top=3,
        sample=4,
        seed=0,
        progress=lambda done, of: told.append((done, of)),
    )
    layout: Layout = base.layout
    assert set(found) == set(layout.counts)
    assert told[-1][0] == told[-1][1] == sum(len(entry.units) for entry in found.values())
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    by_name = {str(unit): unit for kind in layout.counts for unit in layout.units(kind)}
    for kind, entry in found.items():
        count = math.prod(layout.shape(kind))
        assert sum(unit.drawn == "top" for unit in entry.units) == min(3, count)
        assert len(entry.units) == min(7, count)
        truth = exact(engine, base, expert, rows, readout, [by_name[unit.unit] for unit in entry.units]) / gap
        for unit, items in zip(entry.units, truth, strict=True):
            assert unit.exact == pytest.approx(float(items.mean()), abs=2e-5)
            assert unit.stderr == pytest.approx(float(items.std()) / 2, abs=2e-5)
    # final norm and head are estimated exactly: the screen is in the same unit, a fraction of the gap
    for kind in ("final_norm", "lm_head"):
        (unit,) = found[kind].units
        assert unit.screen == pytest.approx(unit.exact, abs=1e-5)
    assert 0 <= noise < 1e-4


def test_units_without_a_score_are_not_verified(models: tuple[Engine, ModelWeights, ModelWeights]) -> None:
    engine, base, expert = models
    direction = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(1)), dim=0)
    readout = AnchorReadout(layer=1, direction=direction, item=[0, 1, 2, 3], sign=[1.0] * 4, items=4)
    rows = pack(SEQUENCES)
    (stored,) = linear(engine, base, [expert], rows, readout)
    found, _ = verify(engine, base, expert, rows, readout, stored=stored, gap=1.0, top=20, sample=20, seed=0)
    assert set(found) == {"head", "neuron", "kv_group", "norm", "embedding"}
    for entry in found.values():
        for unit in entry.units:
            assert unit.unit == "embedding" or int(unit.unit.split(".")[1]) <= 1
            assert not math.isnan(unit.exact)
    assert len(found["head"].units) == 8
    assert found["head"].missed_share is None, "all that are seen were verified"


def test_the_stored_scores_say_what_is_replaced(models: tuple[Engine, ModelWeights, ModelWeights]) -> None:
    engine, base, expert = models
    readout = LogProbReadout(layer=2, sequences=SEQUENCES, starts=[4, 5, 4, 6])
    rows = pack(SEQUENCES)
    (stored,) = linear(engine, base, [expert], rows, readout)
    stored["head"] = torch.zeros_like(stored["head"])
    stored["head"][2, 1] = -1.0
    found, _ = verify(engine, base, expert, rows, readout, stored=stored, gap=1.0, top=1, sample=0, seed=0)
    assert [unit.unit for unit in found["head"].units] == ["head.2.1"]


def test_random_draws_do_not_depend_on_other_kinds() -> None:
    screen = torch.zeros(3, 4)
    random.seed(1)
    one = choose_units(LAYOUT, "head", screen, top=0, sample=4, seed=0)
    random.seed(2)
    assert one == choose_units(LAYOUT, "head", screen, top=0, sample=4, seed=0), "nor on Python's own seed"
