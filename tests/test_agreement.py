"""Rank correlation, overlap, stability and agreement, by hand and on planted signals."""

import math

import pytest
import torch

from wpmerge.agreement import agreement, interval, overlap, resamples, spearman, stability


def test_rank_correlation_and_overlap_by_hand():
    """Ranks 1 2 3 4 against 1 2 4 3: 1 − 6 · 2 / (4 · 15). Units without a value in either do not count."""
    one = torch.tensor([1.0, 2.0, 3.0, 4.0, math.nan])
    other = torch.tensor([10.0, 20.0, 40.0, 30.0, 5.0])
    assert spearman(one, other) == pytest.approx(0.8)
    assert overlap(one, other) == 0.0, "5% of four is one: unit 3 here, unit 2 there"
    assert overlap(one, one) == 1.0
    assert math.isnan(spearman(torch.ones(4), torch.arange(4.0))), "no ranks among equals"
    assert math.isnan(spearman(one[:2], other[:2]))


def test_draws_count_prompts():
    draws = resamples(5, 7, seed=0)
    assert draws.shape == (7, 5) and (draws.sum(axis=1) == 5).all()
    assert interval([1.0, math.nan]) == (1.0, 1.0)


def test_stability_tells_signal_from_noise():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(400, generator=generator).double()
    noise = torch.randn(16, 400, generator=generator).double()
    sure, chance = stability(truth + 0.1 * noise, truth, draws=10), stability(noise, truth, draws=10)
    assert sure.halves > 0.95 and sure.stored > 0.95 and sure.overlap > 0.8
    assert abs(chance.halves) < 0.2 and abs(chance.stored) < 0.2 and chance.overlap < 0.3


def test_agreement_tells_conditions_that_rank_alike_from_those_that_do_not():
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(400, generator=generator).double()
    sides = [truth + 0.3 * torch.randn(8, 400, generator=generator).double() for _ in range(3)]
    alike = agreement(sides[:2], paired=True, draws=20)
    assert alike.spearman > 0.95 and alike.overlap > 0.7
    assert 0.9 < alike.interval[0] <= alike.interval[1] < 1
    other = agreement([sides[0], -sides[1]], paired=False, draws=20)
    assert other.spearman < -0.95 and other.overlap == 0.0
    three = agreement([*sides[:2], -sides[2]], paired=False, draws=20)
    assert three.spearman == pytest.approx(-1 / 3, abs=0.05), "one pair of three agrees"


def test_paired_conditions_draw_the_same_prompts():
    """Effects that are the same under both conditions agree in every draw, if a draw takes the same prompts of both."""
    effects = torch.randn(6, 50, generator=torch.Generator().manual_seed(2)).double()
    assert agreement([effects, effects], paired=True, draws=20).interval == pytest.approx((1.0, 1.0))
    assert agreement([effects, effects], paired=False, draws=20).interval[0] < 0.9
