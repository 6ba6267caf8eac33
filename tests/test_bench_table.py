"""Retention and differences by hand, and what pairing does to intervals."""

import numpy as np
import pytest

from wpmerge.bench_results import BASE_MODEL, EXPERT_MODEL, Record, SkillResult
from wpmerge.bench_table import make_cell

SUBSET = ("a", "b")


def record(subset, strategy, seed, retain=(), **skills):
    made = {
        name: SkillResult(correct=bits, logprob=tuple(-1.0 + int(bit) for bit in bits)) for name, bits in skills.items()
    }
    return Record(subset=subset, strategy=strategy, seed=seed, skills=made, retain=retain, evaluations=seed + 3)


def table(*records, measure="generated", seeds=(0,), strategies=("one", "two"), rivals=("one",)):
    found = {each.key: each for each in records}
    return make_cell(found, SUBSET, strategies, rivals=rivals, measure=measure, seeds=seeds, resamples=500)


def models(seed=0, retain=()):
    return [
        record((), BASE_MODEL, seed, retain, a="10000000", b="0000"),
        record(("a",), EXPERT_MODEL, seed, a="11111000"),
        record(("b",), EXPERT_MODEL, seed, b="1111"),
    ]


@pytest.mark.parametrize("measure", ["generated", "logprob"])
def test_retention_by_hand(measure):
    merges = [record(SUBSET, "one", 0, a="11100000", b="1000"), record(SUBSET, "two", 0, a="11110000", b="1100")]
    cell = table(*models(), *merges, measure=measure)
    one, two = cell.rows
    assert (cell.prompts, cell.seeds) == ({"a": 8, "b": 4}, (0,))
    assert {s: i.value for s, i in one.skills.items()} == {"a": pytest.approx(0.5), "b": pytest.approx(0.25)}
    assert (one.mean.value, one.minimum.value) == (pytest.approx(0.375), pytest.approx(0.25))
    assert (cell.best_mean, cell.best_minimum) == ("one", "one")
    assert one.mean_difference is one.minimum_difference is None
    assert two.mean_difference.value == pytest.approx((0.75 + 0.5) / 2 - 0.375)
    assert two.minimum_difference.value == pytest.approx(0.25)
    assert two.evaluations == 3


def test_differences_are_paired():
    """Two strategies that are right on the same prompts differ by exactly nothing; unpaired they would by chance."""
    merges = [record(SUBSET, name, 0, a="11100000", b="1010") for name in ("one", "two")]
    cell = table(*models(), *merges)
    difference = cell.rows[1].mean_difference
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    assert cell.rows[1].mean.low < cell.rows[1].mean.value < cell.rows[1].mean.high


def test_prompts_of_all_seeds_count_once_each():
    merges = [record(SUBSET, "one", seed, a=bits, b="1000") for seed, bits in ((0, "11100000"), (1, "11111000"))]
    cell = table(*models(0), *models(1), *merges, seeds=(0, 1))
    assert cell.prompts["a"] == 16
    assert cell.rows[0].skills["a"].value == pytest.approx((8 - 2) / (10 - 2))
    assert cell.rows[0].evaluations == 4


def test_only_seeds_that_all_have_are_compared():
    merges = [record(SUBSET, "one", seed, a="11100000", b="1000") for seed in (0, 1)]
    merges.append(record(SUBSET, "two", 1, a="11100000", b="1000"))
    cell = table(*models(0), *models(1), *merges, seeds=(0, 1), strategies=("one", "two", "three"))
    assert cell.seeds == (1,)
    assert [row.strategy for row in cell.rows] == ["one", "two"]
    assert table(*models(0), *merges[1:], seeds=(0, 1)) is None


def test_the_retain_set_is_compared_with_the_base():
    merges = [record(SUBSET, "one", 0, retain=(-1.5, -1.0), a="11100000", b="1000")]
    cell = table(*models(retain=(-1.0, -1.0)), *merges)
    assert cell.rows[0].retain.value == pytest.approx(-0.25)
    assert (cell.rows[0].retain.low, cell.rows[0].retain.high) == (-0.5, 0.0)


def test_an_expert_that_is_no_better_has_no_retention():
    found = [*models()[:2], record(("b",), EXPERT_MODEL, 0, b="0000")]
    cell = table(*found, record(SUBSET, "one", 0, a="11100000", b="1000"))
    assert np.isnan(cell.rows[0].skills["b"].value)
    assert np.isnan(cell.rows[0].minimum.value)
