"""How coefficients move: a step by hand, bounds, what a granularity has of levels."""

import math

import pytest
import torch
from tiny import ModelWeights, tiny_model
from torch import Tensor

from wpmerge.coefficients import make_grouping
from wpmerge.errors import RecipeError
from wpmerge.levels import Levels, Parts, RefineSettings, direction, make_levels, no_parts, together


def tensor(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def levels(**changes: object) -> Levels:
    """One expert; four groups, the first two in one block."""
    given: dict[str, object] = {
        "start": tensor([[0.5, 0.5, 0.5, 0.5]]),
        "block": torch.tensor([0, 0, 1, 1]),
        "weights": (1.0, 2.0, 4.0),
        "ease": tensor([[1.0, 1.0, 2.0, 0.0]]),
        "highest": 1.5,
    }
    return Levels(**{**given, **changes})


def step(case: Levels, gradient: Tensor, coefficients: Tensor) -> Parts:
    """Where both halves of the prompts say the same."""
    return direction(case, (gradient, gradient), coefficients)


def test_a_step_by_hand() -> None:
    """∂U = (1, 2, -1, 5): 7 for the expert, 3 and 4 for the blocks; the last group does not differ from the base.

    ‖∂U‖² = 1·49 + 2·(9 + 16) + 4·(1 + 4 + 2·1 + 0) = 127.
    """
    way = step(levels(), tensor([[1.0, 2.0, -1.0, 5.0]]), levels().start)
    root = math.sqrt(127.0)
    torch.testing.assert_close(way.expert, tensor([[7.0]]) / root)
    torch.testing.assert_close(way.block, tensor([[6.0, 8.0]]) / root)
    torch.testing.assert_close(way.group, tensor([[4.0, 8.0, -8.0, 0.0]]) / root)
    moved = together(levels(), no_parts(levels()).plus(way, 0.1))
    torch.testing.assert_close(moved, 0.5 + 0.1 * tensor([[17.0, 21.0, 7.0, 15.0]]) / root)


def test_a_level_moves_as_far_as_two_halves_agree_on_it() -> None:
    """Halves (3, 1, -1, 0) and (-1, 3, -1, 0), mean (1, 2, -1, 0).

    The expert: 3 and 1 for 2, a = 3/4. Blocks: (4, -1) and (2, -1) for (3, -1), a = 9/10. Groups, p = (1, 1, 2, 0):
    -3 + 3 + 2 for 1 + 4 + 2, a = 2/7. ‖∂U‖² = 3/4 · 4 + 2 · 9/10 · 10 + 4 · 2/7 · 7 = 29.
    """
    halves = (tensor([[3.0, 1.0, -1.0, 0.0]]), tensor([[-1.0, 3.0, -1.0, 0.0]]))
    way = direction(levels(), halves, levels().start)
    root = math.sqrt(29.0)
    torch.testing.assert_close(way.expert, tensor([[0.75 * 2.0]]) / root)
    torch.testing.assert_close(way.block, 2.0 * 0.9 * tensor([[3.0, -1.0]]) / root)
    torch.testing.assert_close(way.group, 4.0 * 2.0 / 7.0 * tensor([[1.0, 2.0, -2.0, 0.0]]) / root)


def test_halves_that_contradict_each_other_move_nothing() -> None:
    one = tensor([[1.0, -2.0, 3.0, 0.0]])
    way = direction(levels(), (one, -0.5 * one), levels().start)
    assert not any(bool(part.any()) for part in (way.expert, way.block, way.group))


def test_noise_moves_single_groups_less_than_what_prompts_share() -> None:
    """A thousand groups of which both halves say +1 and each its own noise of 3."""
    drawn = torch.Generator().manual_seed(0)
    ones = torch.ones(1, 1000, dtype=torch.float64)
    case = Levels(
        start=0.5 * ones, block=torch.zeros(1000, dtype=torch.long), weights=(0.25, 0.0, 250.0), ease=ones, highest=1.5
    )
    halves = tuple(ones + 3.0 * torch.randn(ones.shape, generator=drawn, dtype=torch.float64) for _ in range(2))
    noisy = direction(case, (halves[0], halves[1]), case.start)
    trusted = step(case, (halves[0] + halves[1]) / 2, case.start)
    shares = [float(way.group.norm() / (way.expert.abs().sum() * 1000**0.5)) for way in (noisy, trusted)]
    assert shares[0] < 0.3 * shares[1]  # the signal's share of the noisy mean's square is 1 / (1 + 9/2)


def test_all_of_the_gradient_in_one_level_moves_it_by_its_weight() -> None:
    """Four coefficients, τ = ½, all with the same gradient: each moves by ½, whatever the gradient's size."""
    case = levels(weights=(0.0, 0.0, 0.25 * 4), ease=torch.ones(1, 4, dtype=torch.float64))
    for size in (1e-6, 1.0, 1e6):
        way = step(case, tensor([[1.0, -1.0, 1.0, -1.0]]) * size, case.start)
        torch.testing.assert_close(way.group.abs(), torch.full((1, 4), 0.5, dtype=torch.float64))


def test_what_pushes_out_of_the_bounds_does_not_count() -> None:
    at_bounds = tensor([[0.0, 1.5, 0.0, 1.5]])
    way = step(levels(), tensor([[-9.0, 9.0, 1.0, -1.0]]), at_bounds)
    inward = step(levels(), tensor([[0.0, 0.0, 1.0, -1.0]]), at_bounds)
    for one, other in ((way.expert, inward.expert), (way.block, inward.block), (way.group, inward.group)):
        assert torch.equal(one, other)


def test_no_gradient_is_no_step() -> None:
    way = step(levels(), torch.zeros(1, 4, dtype=torch.float64), levels().start)
    assert float(way.expert.abs().sum() + way.block.abs().sum() + way.group.abs().sum()) == 0.0


def test_coefficients_stay_within_bounds() -> None:
    far = Parts(expert=tensor([[3.0]]), block=tensor([[0.0, -9.0]]), group=tensor([[0.0, -2.5, 0.0, 0.0]]))
    assert together(levels(), far).tolist() == [[1.5, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("granularity", "moving"),
    [("expert", (False, False, True)), ("block", (True, False, True)), ("tensor", (True,) * 3), ("unit", (True,) * 3)],
)
def test_a_granularity_has_the_levels_above_it(granularity: str, moving: tuple[bool, ...]) -> None:
    layout = ModelWeights.of(tiny_model("llama", seed=0)).layout
    grouping = make_grouping(layout, granularity)  # type: ignore[arg-type]
    norms = torch.rand(2, len(grouping.names), dtype=torch.float64) + 0.1
    norms[1, 0] = 0.0
    found = make_levels(RefineSettings(), layout, grouping, norms, torch.full_like(norms, 0.5))
    assert tuple(weight > 0 for weight in found.weights) == moving
    assert float(found.ease[1, 0]) == 0.0
    if granularity == "unit":
        torch.testing.assert_close(found.ease.mean(dim=1), torch.ones(2, dtype=torch.float64))
        ratio = found.ease[0, 0] / found.ease[0, 1]
        torch.testing.assert_close(ratio, (norms[0, 1] / norms[0, 0]).sqrt())
    else:
        assert set(found.ease.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"batch": 0}, {"rate": math.nan}, {"momentum": 1.0}, {"ridge": 1.1}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="out of range"):
        RefineSettings(**wrong)  # type: ignore[arg-type]
