"""Coefficients that weigh what every unit does to every capability at once: rule ``joint``. Pure functions.

    maximise  Σ_f log(ε + min(1, R̂_f)) − (μ/2) Σ_{e,g} w_e(g) (λ[e,g] − s_e)²
    over      0 ≤ λ ≤ λ_max,  with  R̂_f = Σ λ C[e→f] / Σ_g C[f→f],  and  Σ λ C[e→r] ≥ −tolerance  for retain sets r

The objective is concave and touches λ through one number per capability and retain set only. So its dual has as many
variables as there are of those: given multipliers a_f and ν_r, the best λ is s_e + (Σ a_f C_f/T_f + Σ ν_r C_r)/(μ w),
clipped. The dual is solved; the residual of its optimality conditions is reported.

Shape suffixes: F capabilities, R retain sets, E experts, G groups.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.calibration import EPSILON, TOLERANCE

SOLVERS: tuple[dict[str, Any], ...] = (
    {
        "method": "L-BFGS-B",
        "options": {"maxiter": 2000, "maxfun": 20000, "ftol": 1e-16, "gtol": 1e-10, "maxcor": 30},
    },
    {"method": "TNC", "options": {"maxfun": 5000, "ftol": 0.0, "xtol": 0.0, "gtol": 1e-12}},
)
"""Each starts where the other stopped: the dual's gradient has kinks, at which a line search of either may give up."""
ATTEMPTS = 8
ENOUGH = 1e-8
"""Residual at which no further attempt is made."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JointProblem:
    """What is known before coefficients are chosen.

    Attributes:
        effects: C[e→f], the recovery of each group from each expert on each capability; NaN where there is none.
        own: capability number → its own expert's number.
        scales: s_e.
        weights: w_e(g) = ‖Δ_e[g]‖² / ‖Δ_e‖²; a group with 0 keeps the scale.
        mu: what leaving the scales costs.
        highest: λ_max.
        retain: effects of each group on each retain set, nats per token.
        tolerance: what a retain set may lose, nats per token.
    """

    effects: Float[Tensor, "F E G"]
    own: tuple[int, ...]
    scales: Float[Tensor, " E"]
    weights: Float[Tensor, "E G"]
    mu: float
    highest: float
    retain: Float[Tensor, "R E G"]
    tolerance: float = TOLERANCE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JointSolution:
    """The best coefficients of a :class:`JointProblem`.

    Attributes:
        coefficients: λ; the scale where a group has no score at all.
        predicted: R̂_f; NaN for a capability whose own recoveries do not add up to more than 0: it counts for nothing.
        lost: Σ −λ C[e→r] of each retain set, nats per token.
        multipliers: a_f, the utility that one more R̂_f is worth.
        prices: ν_r · tolerance, the utility that one more tolerance is worth.
        residual: largest violation of the optimality conditions: of a fraction of the gap, or of a tolerance.
    """

    coefficients: Float[Tensor, "E G"]
    predicted: Float[Tensor, " F"]
    lost: Float[Tensor, " R"]
    multipliers: Float[Tensor, " F"]
    prices: Float[Tensor, " R"]
    residual: float


def solve_joint(problem: JointProblem) -> JointSolution:
    """Maximise the utility of the predicted retentions; see the module's formula."""
    from scipy.optimize import minimize  # here: it takes a second to import, and most commands do without

    slopes, constant = _slopes(problem)
    count, counted = len(problem.own), ~constant

    def dual(point: np.ndarray) -> tuple[float, np.ndarray]:
        multipliers = torch.from_numpy(point.copy())
        value, gradient, _ = _dual(problem, slopes, multipliers)
        gradient[:count] *= counted
        return value, gradient.numpy()

    start = torch.ones(len(slopes), dtype=torch.float64)
    start[:count] = counted.double()
    start[count:] = 0.0
    bounds = [
        *((0.0, 1.0 / EPSILON * 1e3 if used else 0.0) for used in counted.tolist()),
        *[(0.0, None)] * (len(slopes) - count),
    ]
    best, best_residual = start, math.inf
    point = start.numpy()
    for attempt in range(ATTEMPTS):
        found = minimize(dual, point, jac=True, bounds=bounds, **SOLVERS[attempt % len(SOLVERS)])
        point = found.x.copy()
        reached = torch.from_numpy(point)
        gradient = torch.from_numpy(dual(point)[1])
        residual = float((reached - (reached - gradient).clamp_min(0.0)).abs().max()) if len(slopes) else 0.0
        if residual < best_residual:
            best, best_residual = reached, residual
        if residual <= ENOUGH:
            break
    coefficients = _dual(problem, slopes, best)[2]
    predicted = torch.einsum("feg,eg->f", slopes, coefficients)
    return JointSolution(
        coefficients=coefficients,
        predicted=torch.where(constant, torch.nan, predicted[:count]),
        lost=-predicted[count:] * problem.tolerance,
        multipliers=best[:count],
        prices=best[count:],
        residual=best_residual,
    )


def _slopes(problem: JointProblem) -> tuple[Float[Tensor, "F+R E G"], Tensor]:
    """∂R̂_f/∂λ, and per tolerance for retain sets; and which capabilities have nothing to add up."""
    effects = torch.nan_to_num(problem.effects.double())
    totals = torch.stack([effects[f, e].sum() for f, e in enumerate(problem.own)])
    constant = totals <= 0
    shares = effects / torch.where(constant, 1.0, totals)[:, None, None]
    shares[constant] = 0.0
    shares = torch.cat([shares, torch.nan_to_num(problem.retain.double()) / problem.tolerance])
    return shares * (problem.weights > 0), constant


def _dual(
    problem: JointProblem, slopes: Float[Tensor, "F+R E G"], multipliers: Float[Tensor, " F+R"]
) -> tuple[float, Float[Tensor, " F+R"], Float[Tensor, "E G"]]:
    """The dual function, its gradient, and the λ that is best under these multipliers."""
    count = len(problem.own)
    pull = torch.einsum("f,feg->eg", multipliers, slopes)
    stiff = problem.mu * problem.weights.double()
    scales = problem.scales.double()[:, None]
    free = scales + torch.where(stiff > 0, pull / stiff.clamp_min(1e-300), 0.0)
    coefficients = free.clamp(0.0, problem.highest)
    a = multipliers[:count]
    worth_less = a < 1.0 / (1.0 + EPSILON)  # than what a first step below R = 1 costs: R stays at 1
    wanted = torch.where(worth_less, 1.0, 1.0 / a.clamp_min(1e-12) - EPSILON)
    top = torch.log(torch.tensor(1.0 + EPSILON, dtype=torch.float64))
    values = torch.where(worth_less, top - a, -torch.log(a.clamp_min(1e-12)) - 1.0 + a * EPSILON)
    value = values.sum() + multipliers[count:].sum() + (pull * coefficients).sum()
    value = value - 0.5 * (stiff * (coefficients - scales).square()).sum()
    reached = torch.einsum("feg,eg->f", slopes, coefficients)
    gradient = torch.cat([reached[:count] - wanted, reached[count:] + 1.0])
    return float(value), gradient, coefficients
