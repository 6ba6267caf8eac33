"""Steps that keep what a retain set may lose: by hand, with nothing at stake, with no help, and with several sets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wpmerge.levels import Levels, Parts, direction, laid_out
from wpmerge.retain_steps import HIGHEST, Known, Retained, held_back


def tensor(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def flat(count: int) -> Levels:
    """One expert, a coefficient per group and no other level: a step follows the gradient, with length √count."""
    ones = torch.ones(1, count, dtype=torch.float64)
    return Levels(
        start=0.5 * ones, block=torch.arange(count), weights=(0.0, 0.0, float(count)), ease=ones, highest=10.0
    )


def retained(slope: Tensor, wanted: float) -> Retained:
    return Retained(slopes=(slope, slope), wanted=wanted)


def change(case: Levels, way: Parts, slope: Tensor) -> float:
    return float((slope * laid_out(case, way)).sum())


def same(one: Parts, other: Parts) -> bool:
    pairs = ((one.expert, other.expert), (one.block, other.block), (one.group, other.group))
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_step_by_hand() -> None:
    """∂U = (1, 0), ∂R = (-1, 1): with the price 1 the step is along (0, 1) and R changes by √2; with 1/2, by 0."""
    case, up, slope = flat(2), tensor([[1.0, 0.0]]), tensor([[-1.0, 1.0]])
    still = held_back(case, (up, up), [retained(slope, 0.0)], case.start)
    torch.testing.assert_close(still.group, tensor([[1.0, 1.0]]), atol=1e-4, rtol=0)
    more = held_back(case, (up, up), [retained(slope, 2.0**0.5)], case.start)
    torch.testing.assert_close(more.group, tensor([[0.0, 2.0**0.5]]), atol=1e-4, rtol=0)


def test_where_enough_is_left_the_utility_alone_is_followed() -> None:
    case, up, slope = flat(2), tensor([[1.0, 0.0]]), tensor([[-1.0, 1.0]])
    free = direction(case, (up, up), case.start)[0]
    assert change(case, free, slope) == pytest.approx(-(2.0**0.5))
    assert same(held_back(case, (up, up), [retained(slope, -1.5)], case.start), free)
    assert same(held_back(case, (up, up), [], case.start), free)


def test_where_no_step_is_enough_the_retain_set_alone_is_followed() -> None:
    case, up, slope = flat(2), tensor([[1.0, 0.0]]), tensor([[-1.0, 1.0]])
    way = held_back(case, (up, up), [retained(slope, 9.0)], case.start)
    torch.testing.assert_close(way.group, tensor([[-1.0, 1.0]]), atol=2 / HIGHEST, rtol=0)


def test_several_retain_sets_are_all_kept() -> None:
    case, up = flat(3), tensor([[1.0, 1.0, 0.0]])
    slopes = (tensor([[-1.0, 0.0, 1.0]]), tensor([[0.0, -1.0, 1.0]]))
    way = held_back(case, (up, up), [retained(slopes[0], 0.1), retained(slopes[1], 0.2)], case.start)
    for slope, wanted in zip(slopes, (0.1, 0.2), strict=True):
        assert change(case, way, slope) == pytest.approx(wanted, abs=2e-2)


def test_sets_that_pull_against_each_other_are_kept() -> None:
    case, up = flat(3), tensor([[1.0, 0.0, 0.0]])
    slopes = (tensor([[-0.3, 1.0, 0.1]]), tensor([[-0.3, -1.0, 0.1]]))
    way = held_back(case, (up, up), [retained(slope, 0.05) for slope in slopes], case.start)
    for slope in slopes:
        assert change(case, way, slope) == pytest.approx(0.05, abs=5e-3)


def test_what_the_bounds_undo_does_not_count() -> None:
    """Half of the first expert's groups stand at 0: lowering them with the others brings the retain set nothing."""
    at = tensor([[0.0, 0.0, 5.0, 5.0], [5.0, 5.0, 5.0, 5.0]])
    level = Levels(
        start=at,
        block=torch.zeros(4, dtype=torch.long),
        weights=(1.0, 0.0, 0.0),
        ease=torch.ones_like(at),
        highest=10.0,
    )
    slope = tensor([[-1.0] * 4, [-0.2] * 4])
    up = tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    move = laid_out(level, held_back(level, (up, up), [retained(slope, 0.5)], at))
    assert float((slope * ((at + 1e-3 * move).clamp(0.0, 10.0) - at)).sum()) / 1e-3 == pytest.approx(0.5, abs=1e-3)


@given(st.integers(0, 10_000), st.floats(-2.0, 2.0))
def test_what_is_wanted_is_brought_or_followed_alone(seed: int, wanted: float) -> None:
    """Three levels, gradients of noisy halves: the change is what is wanted, wherever any step brings that much."""
    drawn = torch.Generator().manual_seed(seed)

    def halves() -> tuple[Tensor, Tensor]:
        common = torch.randn(2, 6, generator=drawn, dtype=torch.float64)
        one, other = (common + 0.5 * torch.randn(2, 6, generator=drawn, dtype=torch.float64) for _ in range(2))
        return one, other

    ease = torch.rand(2, 6, generator=drawn, dtype=torch.float64) + 0.5
    start = torch.full((2, 6), 0.5, dtype=torch.float64)
    case = Levels(start=start, block=torch.tensor([0, 0, 0, 1, 1, 1]), weights=(0.5, 0.2, 3.0), ease=ease, highest=1.5)
    up, own = halves(), halves()
    slope = (own[0] + own[1]) / 2
    reached = change(case, held_back(case, up, [Retained(slopes=own, wanted=wanted)], start), slope)
    most = change(case, direction(case, own, start)[0], slope)
    assert reached >= min(wanted, most) - 1e-4 * max(1.0, abs(most))


def test_what_a_set_lost_is_known_of_all_its_prompts() -> None:
    """Of those that a step reads as they are now, of the others as they were."""
    known = Known(changes=tensor([-0.5, 0.0, 0.0, 1.0]))
    weights = known.weigh(torch.tensor([-1.0, -2.0]), before=tensor([-1.5, -1.0]), items=[2, 1])
    assert weights.tolist() == [0.5, 0.5]
    assert known.changes.tolist() == [-0.5, -1.0, 0.5, 1.0]
    assert known.lost == 0.0
