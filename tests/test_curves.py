"""Sets, matched rankings and areas, on numbers that can be counted by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wpmerge.curves import area, chosen, matched, order_by, recovered, strata

SIZES = torch.tensor([4.0, 1.0, 1.0, 2.0, 2.0], dtype=torch.float64)
VALUES = torch.tensor([4.0, 3.0, math.nan, 1.0, 9.0], dtype=torch.float64)


def test_units_are_ordered_by_value_per_parameter():
    """9/2, 3/1, 4/4, 1/2, and what has no value last; what did not move is left out."""
    assert order_by(VALUES, SIZES, torch.ones(5, dtype=torch.bool)).tolist() == [4, 1, 0, 3, 2]
    assert order_by(VALUES, SIZES, torch.tensor([True, True, False, True, False])).tolist() == [1, 0, 3]


def test_a_set_takes_what_fits_in_order():
    """Of 10 parameters: 30% are units 4 and 1; at 50% unit 0 (4) is too large, 3 (2) fits."""
    order = order_by(VALUES, SIZES, torch.ones(5, dtype=torch.bool))
    sets = [mask.nonzero().flatten().tolist() for mask in chosen(order, SIZES, (0.0, 0.3, 0.5, 1.0))]
    assert sets == [[], [1, 4], [1, 3, 4], [0, 1, 2, 3, 4]]


@given(st.integers(0, 1000))
def test_random_rankings_stay_in_their_strata(seed):
    groups = [("neuron", i // 32) for i in range(64)] + [("head", 0)] * 4 + [("embedding", 0)]
    norms = torch.rand(69, generator=torch.Generator().manual_seed(seed))
    alike = strata(groups, norms)
    assert len(alike.unique()) == 2 * 4 + 1 + 1
    values = torch.arange(69.0)
    dealt = matched(values, alike, seed=seed)
    for number in alike.unique():
        own = alike == number
        assert len({groups[i] for i in own.nonzero().flatten().tolist()}) == 1
        assert sorted(dealt[own].tolist()) == sorted(values[own].tolist())
    bins = [norms[:32][alike[:32] == number] for number in alike[:32].unique()]
    ordered = sorted(bins, key=lambda part: float(part.min()))
    assert all(one.max() <= other.min() for one, other in pairwise(ordered))


def test_areas_by_hand():
    """f = 1 at k = .5: triangle .25 and square .5; the missing area is the other triangle."""
    found = area((0.5,), (1.0,))
    assert (found.cpr, found.cmd) == pytest.approx((0.75, 0.25))
    over = area((0.5,), (2.0,))
    assert over.cpr == pytest.approx(1.25) and over.cmd == pytest.approx(0.75)
    assert area((0.5,), (0.0,), ends=(1.0, 0.0)).cpr == pytest.approx(0.25)


def test_recovery_is_a_ratio_of_means():
    base, expert = np.array([0.0, 0.0]), np.array([1.0, 3.0])
    items = np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 3.0]])
    assert recovered(items, base, expert)[0].tolist() == [0.0, 0.5, 1.0]
    assert recovered(items, base, expert, np.array([[2.0, 0.0]]))[0].tolist() == [0.0, 1.0, 1.0]
