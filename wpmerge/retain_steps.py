"""Retain sets in a step of ``refine``: the one the utility asks for most, of all that keep what a set may lose.

A step of rate η along d changes a retain set's mean log-probability R by η⟨∂R, d⟩, to first order. The step follows
∂U + Σ_r μ_r ∂R_r with the least μ_r ≥ 0 at which every retain set changes by at least what is asked of it; how
:func:`~wpmerge.levels.direction` turns a gradient into d is left as it is.

Shape suffixes: E experts, G groups.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.levels import Levels, Parts, direction, laid_out

Halves = tuple[Float[Tensor, "E G"], Float[Tensor, "E G"]]
"""A gradient on two halves of the prompts."""

HIGHEST = 1e6
"""μ beyond which only the retain set is followed, utility per nat."""
ROUNDS = 24
"""Bisections of μ, on a logarithmic scale."""
SWEEPS = 24
"""Over several retain sets, each given the others' multipliers; fewer once these stand still."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Retained:
    """What a step knows of a retain set.

    Attributes:
        slopes: ∂R on two halves of its prompts, nats per token.
        wanted: how much R must change at rate 1, nats per token; negative where some may still be lost.
    """

    slopes: Halves
    wanted: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Known:
    """What a retain set's prompts have changed by, each when it was last read: few at a time say little of them all.

    Attributes:
        changes: log-probability minus the base's, nats per token.
    """

    changes: Float[Tensor, " items"]

    def weigh(
        self, values: Float[Tensor, " some"], *, before: Float[Tensor, " some"], items: Sequence[int]
    ) -> Float[Tensor, " some"]:
        """The derivative of the mean of some prompts; remembers what was read."""
        self.changes[list(items)] = values.double().cpu() - before
        return torch.full_like(before, 1.0 / len(before))

    @property
    def lost(self) -> float:
        """Nats per token below the base, losses and gains together."""
        return -float(self.changes.mean())


def held_back(
    levels: Levels, halves: Halves, retained: Sequence[Retained], coefficients: Float[Tensor, "E G"]
) -> Parts:
    """The step of rate 1 along the utility's gradient, bent so that every retain set changes by what is wanted of it.

    Args:
        levels: how far each may move.
        halves: ∂U on two halves of the prompts.
        retained: the retain sets. Where no step brings what is wanted, the one that follows them alone is taken.
        coefficients: λ.
    """
    prices = [0.0] * len(retained)

    def step() -> Parts:
        bent = [
            half + sum(price * each.slopes[place] for price, each in zip(prices, retained, strict=True))
            for place, half in enumerate(halves)
        ]
        return direction(levels, (bent[0], bent[1]), coefficients)[0]

    def enough(number: int, price: float) -> bool:
        prices[number] = price
        one, other = retained[number].slopes
        move = laid_out(levels, step())
        stopped = ((coefficients <= 0.0) & (move < 0.0)) | ((coefficients >= levels.highest) & (move > 0.0))
        return float(((one + other) / 2 * move.masked_fill(stopped, 0.0)).sum()) >= retained[number].wanted

    for _ in range(SWEEPS):
        before = list(prices)
        for number in range(len(retained)):
            prices[number] = _least(partial(enough, number))
        if len(retained) < 2 or all(math.isclose(*pair, rel_tol=1e-4) for pair in zip(before, prices, strict=True)):
            break
    return step()


def _least(enough: Callable[[float], bool]) -> float:
    """The least price that is enough, within a factor; 0 if none is needed, :data:`HIGHEST` if none is."""
    if enough(0.0):
        return 0.0
    if not enough(HIGHEST):
        return HIGHEST
    low, high = math.log(1.0 / HIGHEST), math.log(HIGHEST)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(math.exp(middle)) else (middle, high)
    return math.exp(high)
