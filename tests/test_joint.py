"""Rule joint: by hand, against brute force, and its optimality conditions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wpmerge.calibration import EPSILON
from wpmerge.joint import JointProblem, solve_joint

NAN = math.nan


def tensor(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def problem(effects: Tensor, **changes: object) -> JointProblem:
    """One capability per expert, equal weights."""
    experts, groups = effects.shape[1:]
    given: dict[str, object] = {
        "effects": effects,
        "own": tuple(range(len(effects))),
        "scales": torch.full((experts,), 0.5, dtype=torch.float64),
        "weights": torch.full((experts, groups), 1.0 / groups, dtype=torch.float64),
        "mu": 1.0,
        "highest": 1.5,
        "retain": torch.zeros(0, experts, groups, dtype=torch.float64),
    }
    return JointProblem(**{**given, **changes})


def objective(case: JointProblem, coefficients: Tensor) -> float:
    """The formula, written again."""
    effects = case.effects.nan_to_num()
    value = 0.0
    for f, own in enumerate(case.own):
        reached = float((coefficients * effects[f]).sum() / effects[f, own].sum())
        value += math.log(EPSILON + min(1.0, reached)) if reached > -EPSILON else -math.inf
    pull = case.weights * (coefficients - case.scales[:, None]) ** 2
    return value - case.mu / 2 * float(pull.sum())


def test_two_units_by_hand() -> None:
    """One expert, C = (.9, .1), w = ½ each, s = ½, μ = 1, ε neglected nowhere.

    λ = ½ + 2aC and R = ½ + 2a·.82 = ½ + 1.64a, where a = 1/(ε + R): a(.51 + 1.64a) = 1.
    """
    a = (-0.51 + math.sqrt(0.51**2 + 4 * 1.64)) / (2 * 1.64)
    found = solve_joint(problem(tensor([[[0.9, 0.1]]])))
    if 0.5 + 1.64 * a > 1:  # then R stops at 1: 1.64a = .5
        a = 0.5 / 1.64
    assert a == pytest.approx(0.3048780)
    torch.testing.assert_close(found.coefficients, tensor([[0.5 + 1.8 * a, 0.5 + 0.2 * a]]))
    assert float(found.multipliers[0]) == pytest.approx(a)
    assert float(found.predicted[0]) == pytest.approx(1.0)
    assert found.residual < 1e-8


def test_two_units_that_do_not_reach_the_expert() -> None:
    """μ = 4: λ = ½ + aC/2, R = ½ + .41a with a = 1/(ε + R): .41a² + .51a − 1 = 0."""
    a = (-0.51 + math.sqrt(0.51**2 + 4 * 0.41)) / (2 * 0.41)
    found = solve_joint(problem(tensor([[[0.9, 0.1]]]), mu=4.0))
    torch.testing.assert_close(found.coefficients, tensor([[0.5 + 0.45 * a, 0.5 + 0.05 * a]]))
    assert float(found.predicted[0]) == pytest.approx(0.5 + 0.41 * a)
    assert 0.5 + 0.41 * a < 1


def test_a_unit_that_hurts_another_capability_is_turned_down() -> None:
    effects = tensor([[[0.5, 0.5], [0.0, -0.4]], [[0.0, -0.6], [0.5, 0.5]]])
    found = solve_joint(problem(effects, mu=0.5)).coefficients
    assert found[0, 0] > 0.5 > found[0, 1]
    assert found[1, 0] > found[1, 1]


@st.composite
def cases(draw: st.DrawFn) -> JointProblem:
    seed = draw(st.integers(0, 10**6))
    experts, groups, retained = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(seed)
    effects = torch.randn(experts, experts, groups, generator=generator, dtype=torch.float64) * 0.3
    effects += torch.eye(experts, dtype=torch.float64)[:, :, None] * 0.8
    weights = torch.rand(experts, groups, generator=generator, dtype=torch.float64) + 0.05
    return problem(
        effects,
        weights=weights / weights.sum(1, keepdim=True),
        scales=torch.rand(experts, generator=generator, dtype=torch.float64) * 1.5,
        mu=draw(st.sampled_from([0.05, 0.5, 2.0, 20.0])),
        retain=torch.randn(retained, experts, groups, generator=generator, dtype=torch.float64) * 0.05,
    )


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 10**6))
def test_no_feasible_point_is_better(case: JointProblem, seed: int) -> None:
    found = solve_joint(case)
    assert found.residual < 1e-5
    best = found.coefficients
    assert float(best.min()) >= 0 and float(best.max()) <= case.highest
    assert bool((found.lost <= case.tolerance * (1 + 1e-4)).all())
    reached = objective(case, best)
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 0.05, 0.5):
        for _ in range(20):
            other = (best + size * torch.randn(best.shape, generator=generator, dtype=torch.float64)).clamp(0.0, 1.5)
            lost = -torch.einsum("reg,eg->r", case.retain, other)
            if bool((lost <= case.tolerance).all()):
                assert objective(case, other) <= reached + 1e-4


def test_a_retain_set_binds() -> None:
    """Unit 0 of the only expert costs .05 nats per λ: with a tolerance of .02 it gets at most .4."""
    effects, retain = tensor([[[0.5, 0.5]]]), tensor([[[-0.05, 0.0]]])
    free = solve_joint(problem(effects))
    bound = solve_joint(problem(effects, retain=retain))
    assert float(free.coefficients[0, 0]) > 0.6
    assert float(bound.coefficients[0, 0]) == pytest.approx(0.4, abs=1e-6)
    assert float(bound.lost[0]) == pytest.approx(0.02, abs=1e-7)
    assert float(bound.prices[0]) > 0 == float(free.prices.numel())
    loose = solve_joint(problem(effects, retain=retain * 0.1))
    torch.testing.assert_close(loose.coefficients, free.coefficients, rtol=0, atol=1e-6)
    assert float(loose.prices[0]) == pytest.approx(0.0, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_permuting_experts_permutes_coefficients(case: JointProblem, chance: object) -> None:
    order = list(range(len(case.scales)))
    chance.shuffle(order)  # type: ignore[attr-defined]
    moved = problem(
        case.effects[order][:, order],
        weights=case.weights[order],
        scales=case.scales[order],
        mu=case.mu,
        retain=case.retain[:, order],
    )
    there, back = solve_joint(moved).coefficients, solve_joint(case).coefficients[order]
    torch.testing.assert_close(there, back, rtol=0, atol=1e-4)


def test_what_has_no_score_keeps_the_scale() -> None:
    effects = tensor([[[0.9, NAN, 0.1], [0.1, NAN, -0.1]], [[-0.2, NAN, 0.1], [0.4, NAN, 0.6]]])
    found = solve_joint(problem(effects, scales=tensor([0.3, 0.8])))
    assert found.coefficients[:, 1].tolist() == [0.3, 0.8]
    assert not torch.isclose(found.coefficients[:, 0], tensor([0.3, 0.8])).any()


def test_all_zero_scores_give_the_scaled_merge() -> None:
    found = solve_joint(problem(torch.zeros(2, 2, 4, dtype=torch.float64), scales=tensor([0.3, 0.8])))
    assert found.coefficients.tolist() == [[0.3] * 4, [0.8] * 4]
    assert bool(found.predicted.isnan().all())


def test_a_large_mu_keeps_the_scales_and_what_does_not_differ_keeps_its_own() -> None:
    effects = tensor([[[0.9, 0.1, 0.0]]])
    stiff = solve_joint(problem(effects, mu=1e6)).coefficients
    torch.testing.assert_close(stiff, tensor([[0.5, 0.5, 0.5]]), rtol=0, atol=1e-5)
    still = solve_joint(problem(effects, weights=tensor([[0.5, 0.5, 0.0]]))).coefficients
    assert float(still[0, 2]) == 0.5
