"""Operators that combine a base with its experts: task arithmetic, linear, TIES, DARE. Pure, on float32 blocks.

Shapes: a block is flat, or [rows, columns] where a coefficient varies along one of the two; coefficients broadcast
against it. Deltas are expert - base. Every function is elementwise but for :func:`keep_largest`, so that a tensor may
be cut into blocks anywhere.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def task_arithmetic(
    base: Float[Tensor, "*block"],
    experts: Sequence[Float[Tensor, "*block"]],
    coefficients: Sequence[Float[Tensor, "..."]],
) -> Float[Tensor, "*block"]:
    """base + Σ_e c_e (expert_e - base) (Ilharco et al. 2023, section 2), summed in the order given.

    The deltas are summed before the base is added: they are small beside it, and their sum keeps more digits alone.
    """
    return base + weighted_sum([expert - base for expert in experts], coefficients, like=base)


def linear(
    models: Sequence[Float[Tensor, "*block"]], coefficients: Sequence[Float[Tensor, "..."]]
) -> Float[Tensor, "*block"]:
    """Σ_m c_m model_m, the weighted average where the coefficients sum to 1 (Wortsman et al. 2022)."""
    return weighted_sum(models, coefficients, like=models[0])


def weighted_sum(
    terms: Sequence[Float[Tensor, "*block"]],
    coefficients: Sequence[Float[Tensor, "..."]],
    *,
    like: Float[Tensor, "*block"],
) -> Float[Tensor, "*block"]:
    """Σ c_i term_i in the order given; zeros shaped like ``like`` where there are no terms."""
    total = None
    for term, coefficient in zip(terms, coefficients, strict=True):
        weighted = term * coefficient
        total = weighted if total is None else total.add_(weighted)
    return torch.zeros_like(like) if total is None else total


def keep_largest(delta: Float[Tensor, " n"], density: float) -> Float[Tensor, " n"]:
    """TIES' trim: zero all but the max(1, ⌊density · n⌋) entries of largest magnitude.

    Entries of equal magnitude are kept by lowest flat index. Selection, not sorting (Yadav et al. 2023, section 3).

    Args:
        delta: a whole tensor's delta, flat.
        density: fraction kept, in [0, 1]; 0 keeps nothing.
    """
    keep = 0 if density <= 0 else max(1, math.floor(density * delta.numel()))
    if keep >= delta.numel():
        return delta.clone()
    if keep == 0:
        return torch.zeros_like(delta)
    magnitude = delta.abs()
    threshold = torch.kthvalue(magnitude, delta.numel() - keep + 1).values
    above = magnitude > threshold
    at = magnitude == threshold
    kept = above | (at & (torch.cumsum(at, 0) <= keep - above.sum()))
    return torch.where(kept, delta, 0.0)


def ties(
    deltas: Sequence[Float[Tensor, "*block"]],
    coefficients: Sequence[Float[Tensor, "..."]],
    *,
    normalize: bool = True,
) -> Float[Tensor, "*block"]:
    """TIES' elect and disjoint merge of trimmed deltas (Yadav et al. 2023, section 3): what is added to the base.

    The sign of Σ_e c_e δ_e is elected, + where it is 0; entries of that sign are summed with their coefficients and,
    under ``normalize``, divided by the sum of those coefficients.
    """
    weighted = [delta * coefficient for delta, coefficient in zip(deltas, coefficients, strict=True)]
    elected = torch.stack(weighted).sum(0) >= 0
    total, weight = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for delta, coefficient in zip(weighted, coefficients, strict=True):
        agrees = torch.where(elected, delta > 0, delta < 0)
        total += torch.where(agrees, delta, 0.0)
        weight += torch.where(agrees, coefficient, 0.0)
    return total / torch.where(weight == 0, 1.0, weight) if normalize else total


def drop_and_rescale(
    delta: Float[Tensor, " n"], density: float, *, seed: int, start: int = 0, rescale: bool = True
) -> Float[Tensor, " n"]:
    """DARE (Yu et al. 2024, section 3.2): drop entries at random, divide the rest by the density.

    Whether an entry is dropped depends on ``seed`` and its flat index alone, whatever the blocks and threads.

    Args:
        delta: elements ``start`` on of a tensor's delta.
        density: probability of being kept, in (0, 1].
        seed: one per tensor and expert.
        start: flat index of the block's first element in its tensor.
        rescale: divide what is kept by the density, so that the expectation stays.
    """
    kept = random_mask(delta.numel(), density, seed=seed, start=start)
    return torch.where(kept, delta / density if rescale else delta, 0.0)


def random_mask(n: int, density: float, *, seed: int, start: int = 0) -> Bool[Tensor, " n"]:
    """A Bernoulli(density) mask of elements ``start`` to ``start + n``: a hash of (seed, index) against a threshold.

    The hash is the finaliser of MurmurHash3 (32 bits), applied to the low and high words of the index in turn.
    """
    mask, state, spare = np.empty(n, np.bool_), np.empty(n, np.uint32), np.empty(n, np.uint32)
    fill_random_mask(mask, state, spare, density, seed=seed, start=start)
    return torch.from_numpy(mask)


def fill_random_mask(
    mask: NDArray[np.bool_],
    state: NDArray[np.uint32],
    spare: NDArray[np.uint32],
    density: float,
    *,
    seed: int,
    start: int,
) -> None:
    """:func:`random_mask` into ``mask``; ``state`` and ``spare`` are scratch of the same length."""
    n = len(mask)
    before = min(n, (1 << 32) - (start & _MASK32))  # elements until the index's high word changes
    if before < n:
        fill_random_mask(mask[before:], state[before:], spare[before:], density, seed=seed, start=start + before)
        mask, state, spare = mask[:before], state[:before], spare[:before]
    state[:] = _counting(len(mask))
    np.add(state, np.uint32(start & _MASK32), out=state)
    np.bitwise_xor(state, np.uint32(seed & _MASK32), out=state)
    _mix(state, spare)
    np.bitwise_xor(state, np.uint32((start >> 32 ^ seed >> 32 ^ 0x9E3779B9) & _MASK32), out=state)
    _mix(state, spare)
    limit = round(density * 2**32)
    if limit > _MASK32:
        mask[:] = True
    else:
        np.less(state, np.uint32(limit), out=mask)


def _counting(n: int) -> NDArray[np.uint32]:
    """0 to n - 1; the longest so far is kept."""
    global _numbers  # noqa: PLW0603 - a constant that grows
    if len(_numbers) < n:
        _numbers = np.arange(n, dtype=np.uint32)
    return _numbers[:n]


_numbers: NDArray[np.uint32] = np.arange(0, dtype=np.uint32)


def _mix(x: NDArray[np.uint32], spare: NDArray[np.uint32]) -> None:
    """MurmurHash3's fmix32, in place; products wrap."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        np.right_shift(x, np.uint32(shift), out=spare)
        np.bitwise_xor(x, spare, out=x)
        if factor != 1:
            np.multiply(x, np.uint32(factor), out=x)
