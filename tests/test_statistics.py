"""Standard errors, bootstrap intervals and retention against values worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wpmerge.statistics import (
    Interval,
    Outcomes,
    SkillOutcomes,
    bootstrap_scores,
    mean_score,
    percentile_interval,
    pooled,
    retained_fraction,
    retention,
    standard_error,
)


def of(successes: list[float], trials: list[float] | None = None) -> Outcomes:
    return Outcomes(
        successes=np.array(successes, dtype=float),
        trials=np.ones(len(successes)) if trials is None else np.array(trials, dtype=float),
    )


def difference(model: Outcomes, reference: Outcomes, **options: int) -> Interval:
    scores = bootstrap_scores([model, reference], **options)
    return percentile_interval(mean_score(model) - mean_score(reference), scores[0] - scores[1])


def test_score_and_standard_error_of_an_accuracy() -> None:
    outcomes = of([1, 0, 0, 1, 1])
    assert mean_score(outcomes) == 0.6
    # s² = (3·0.4² + 2·0.6²) / 4 = 0.3, s/√5 = √0.06
    assert standard_error(outcomes) == pytest.approx(math.sqrt(0.06))


def test_standard_error_treats_the_document_as_the_unit() -> None:
    # three documents with 2, 1 and 3 instructions, of which 2, 0 and 1 are followed: 3 of 6
    outcomes = of([2, 0, 1], [2, 1, 3])
    assert mean_score(outcomes) == 0.5
    # residuals 2-1, 0-0.5, 1-1.5: squares sum to 1.5; 3/2 · 1.5 / 36 = 0.0625
    assert standard_error(outcomes) == pytest.approx(0.25)


def test_documents_without_a_trial_change_nothing() -> None:
    with_gaps = of([2, 0, 0, 1, 0], [2, 0, 1, 3, 0])
    without = of([2, 0, 1], [2, 1, 3])
    assert mean_score(with_gaps) == mean_score(without)
    assert standard_error(with_gaps) == standard_error(without)


def test_undefined_values_are_nan() -> None:
    assert math.isnan(mean_score(of([0.0], [0.0])))
    assert math.isnan(standard_error(of([1.0])))


def test_bootstrap_spread_agrees_with_the_closed_form() -> None:
    generator = np.random.default_rng(3)
    outcomes = of(list((generator.random(400) < 0.3).astype(float)))
    scores = bootstrap_scores([outcomes], resamples=20_000, seed=1)[0]
    assert scores.mean() == pytest.approx(mean_score(outcomes), abs=1e-3)
    assert scores.std() == pytest.approx(standard_error(outcomes), rel=0.03)


def test_bootstrap_of_two_documents_is_the_binomial_one() -> None:
    scores = bootstrap_scores([of([0, 1])], resamples=20_000, seed=0)[0]
    shares = [float((scores == value).mean()) for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


def test_pairing_removes_what_documents_share() -> None:
    # the model follows every prompt that the reference follows, and one in twenty more
    reference = of([1, 0] * 100)
    model = of([1, 0] * 90 + [1, 1] * 10)
    paired = difference(model, reference)
    assert paired.value == pytest.approx(0.05)
    assert 0 < paired.low < 0.05 < paired.high
    # s of the difference is √(0.05·0.95) over √200; unpaired it would be 3.2 times as wide
    assert paired.high - paired.low == pytest.approx(2 * 1.96 * math.sqrt(0.05 * 0.95 / 200), rel=0.1)


def test_a_model_differs_from_itself_by_exactly_nothing() -> None:
    outcomes = of([1, 0, 1, 1])
    interval = difference(outcomes, outcomes)
    assert (interval.value, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_the_seed_decides_the_draws() -> None:
    model, reference = of([1, 0, 1, 1, 0, 1]), of([0, 0, 1, 0, 0, 1])
    assert np.array_equal(bootstrap_scores([model], seed=5), bootstrap_scores([model], seed=5))
    assert not np.array_equal(bootstrap_scores([model], seed=5), bootstrap_scores([model], seed=6))
    assert difference(model, reference, seed=5) == difference(model, reference, seed=5)


def test_paired_outcomes_of_different_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="same documents"):
        difference(of([1, 0]), of([1, 0, 1]))


def test_a_pooled_score_is_the_mean_of_the_sets() -> None:
    small, large = of([1, 0]), of([1, 1, 1, 0, 1, 1])  # 1/2 and 5/6
    assert mean_score(pooled([small, large], by_size=True)) == pytest.approx(6 / 8)
    assert mean_score(pooled([small, large], by_size=False)) == pytest.approx((1 / 2 + 5 / 6) / 2)
    several = of([2, 0, 1], [2, 1, 3])  # 3 of 6 in three documents
    assert mean_score(pooled([several, large], by_size=True)) == pytest.approx((3 * 0.5 + 6 * 5 / 6) / 9)
    assert pooled([small, pooled([large, several], by_size=True)], by_size=True).strata == (2, 6, 3)
    assert math.isnan(mean_score(pooled([small, of([0.0], [0.0])], by_size=True)))


def test_pooled_sets_are_resampled_each_by_itself() -> None:
    # each set is all right or all wrong: nothing varies within one, so nothing varies
    sets = [of([1.0] * 4), of([0.0] * 12)]
    assert np.allclose(bootstrap_scores([pooled(sets, by_size=True)])[0], 4 / 16)
    assert np.allclose(bootstrap_scores([pooled(sets, by_size=False)])[0], 1 / 2)
    # independent means: Var = (Σ se²) / k²
    generator = np.random.default_rng(0)
    parts = [of(list((generator.random(n) < 0.5).astype(float))) for n in (50, 400)]
    spread = bootstrap_scores([pooled(parts, by_size=False)], resamples=20_000)[0].std()
    assert spread == pytest.approx(math.hypot(*map(standard_error, parts)) / 2, rel=0.03)
    with pytest.raises(ValueError, match="same documents"):
        bootstrap_scores([pooled([of([1]), of([1, 0])], by_size=True), of([1, 1, 0])])


def test_the_retained_fraction_of_several_merges() -> None:
    base, expert = np.array([0.2, 0.5]), np.array([1.0, 0.5])
    found = retained_fraction(base, expert, np.array([[0.6, 1.0], [0.2, 0.0]]))
    assert found[:, 0] == pytest.approx([0.5, 0.0])
    assert np.isnan(found[:, 1]).all()


def skill(documents: str, base: list[float], expert: list[float], merged: list[float]) -> SkillOutcomes:
    return SkillOutcomes(documents=documents, base=of(base), expert=of(expert), merged=of(merged))


def test_retention_by_hand() -> None:
    ten = [1.0] * 10
    skills = {
        "format": skill("a", [1.0] * 2 + [0.0] * 8, ten, [1.0] * 6 + [0.0] * 4),  # (0.6 - 0.2) / (1 - 0.2) = 0.5
        "json": skill("b", [0.0] * 10, ten, [1.0] * 9 + [0.0]),  # 0.9
    }
    result = retention(skills)
    assert result.skills["format"].value == pytest.approx(0.5)
    assert result.skills["json"].value == pytest.approx(0.9)
    assert result.mean.value == pytest.approx(0.7)
    assert result.minimum.value == pytest.approx(0.5)
    for interval in [*result.skills.values(), result.mean, result.minimum]:
        assert interval.low <= interval.value <= interval.high
        assert interval.high > interval.low


def test_retention_of_the_base_is_0_and_of_the_expert_1() -> None:
    base, expert = [1.0, 0.0, 0.0, 0.0] * 10, [1.0, 1.0, 1.0, 0.0] * 10
    for merged, value in [(base, 0.0), (expert, 1.0)]:
        result = retention({"s": skill("a", base, expert, merged)}).skills["s"]
        assert (result.value, result.low, result.high) == (value, value, value)


def test_skills_of_the_same_documents_are_resampled_together() -> None:
    base, expert, merged = [0.0] * 20, [1.0] * 20, [1.0, 0.0] * 10
    opposite = [0.0, 1.0] * 10  # what one skill loses in a draw the other gains
    together = retention({"x": skill("a", base, expert, merged), "y": skill("a", base, expert, opposite)})
    apart = retention({"x": skill("a", base, expert, merged), "y": skill("b", base, expert, opposite)})
    assert (together.mean.low, together.mean.high) == pytest.approx((0.5, 0.5))
    assert apart.mean.high - apart.mean.low > 0.1


def test_skills_of_as_many_documents_share_a_draw_and_others_have_their_own() -> None:
    base, expert, merged = [0.0] * 20, [1.0] * 20, [1.0, 0.0] * 10
    skills = {
        "x": skill("a", base, expert, merged),
        "y": skill("b", base, expert, merged),
        "z": skill("a", base, expert, merged),
        "fewer": skill("a", base[:8], expert[:8], merged[:8]),  # a group's metric that some of its tasks lack
    }
    found = retention(skills).skills
    assert list(found) == list(skills)
    assert found["x"] == found["z"] == retention({"x": skills["x"]}).skills["x"]
    assert found["y"] == retention({"y": skills["y"]}, seed=1).skills["y"]
    assert found["fewer"] == retention({"fewer": skills["fewer"]}).skills["fewer"]


def test_retention_is_undefined_where_the_expert_is_no_better() -> None:
    result = retention({"s": skill("a", [1.0, 0.0], [1.0, 0.0], [1.0, 1.0])})
    assert all(math.isnan(x) for x in (result.skills["s"].value, result.mean.value, result.minimum.low))
    with pytest.raises(ValueError, match="at least one"):
        retention({})


def test_a_gap_within_noise_has_no_interval() -> None:
    # expert better on one document of four: in about (3/4)^4 = 0.32 of the draws there is no gap at all
    result = retention({"s": skill("a", [0.0] * 4, [1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0])}).skills["s"]
    assert result.value == 1.0
    assert math.isnan(result.low) and math.isnan(result.high)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40), st.integers(0, 2**31))
def test_intervals_lie_within_the_range_of_a_difference(pairs: list[tuple[bool, bool]], seed: int) -> None:
    model, reference = of([float(a) for a, _ in pairs]), of([float(b) for _, b in pairs])
    interval = difference(model, reference, resamples=200, seed=seed)
    swapped = difference(reference, model, resamples=200, seed=seed)
    assert -1 <= interval.low <= interval.high <= 1
    assert swapped.value == -interval.value
    assert swapped.low == pytest.approx(-interval.high)
