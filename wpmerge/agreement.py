"""How far two rankings of units agree, and how far a ranking rests on the prompts it was taken on. Pure functions.

Definitions: docs/method.md, sections "Readouts" and "What makes a ranking believed".

Shape suffixes: G units, n and m prompts, B bootstrap draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

STRONGEST = 0.05
"""Share of the units whose overlap is counted: the strongest."""


def resamples(count: int, draws: int, *, seed: int) -> Float[np.ndarray, "B n"]:
    """How often each of ``count`` prompts is drawn in each bootstrap draw."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(float)


def interval(draws: Sequence[float] | Float[np.ndarray, " B"]) -> tuple[float, float]:
    """The central 95% of bootstrap draws; those without a value are left out."""
    found = np.asarray(draws, dtype=float)
    found = found[np.isfinite(found)]
    if not len(found):
        return (float("nan"), float("nan"))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def spearman(one: Float[Tensor, " G"], other: Float[Tensor, " G"]) -> float:
    """Rank correlation; units without a value in either are left out. NaN with fewer than three, or all alike."""
    from scipy.stats import spearmanr

    known = ~(one.isnan() | other.isnan())
    first, second = one[known], other[known]
    if len(first) < 3 or any(bool((each == each[0]).all()) for each in (first, second)):
        return float("nan")
    return float(spearmanr(first.numpy(), second.numpy()).statistic)


def overlap(one: Float[Tensor, " G"], other: Float[Tensor, " G"]) -> float:
    """Share of the strongest 5% of one that are among the strongest 5% of the other, of units with a value in both."""
    known = ~(one.isnan() | other.isnan())
    top = max(1, int(known.sum() * STRONGEST))
    first, second = (set(each[known].topk(top).indices.tolist()) for each in (one, other))
    return len(first & second) / top


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability:
    """How far a ranking rests on the prompts it was taken on.

    Attributes:
        halves: mean rank correlation of the effects from two random halves of the prompts.
        halves_interval: its central 95% over splits.
        overlap: mean share of the strongest 5% of one half that are among the strongest 5% of the other.
        bootstrap: rank correlation of a bootstrap draw of the prompts with all prompts, central 95%.
        stored: rank correlation of all prompts' effects with the ranking that is judged.
    """

    halves: float
    halves_interval: tuple[float, float]
    overlap: float
    bootstrap: tuple[float, float]
    stored: float


def stability(
    effects: Float[Tensor, "n G"], stored: Float[Tensor, " G"], *, draws: int = 100, seed: int = 0
) -> Stability:
    """Rank stability over prompts.

    Args:
        effects: of each unit on each prompt.
        stored: the ranking's numbers.
        draws: splits in halves, and bootstrap draws.
        seed: of both.
    """
    chance, whole, count = np.random.default_rng(seed), effects.mean(dim=0), len(effects)
    halves, overlaps = [], []
    for _ in range(draws):
        order = torch.from_numpy(chance.permutation(count))
        one, other = effects[order[: count // 2]].mean(dim=0), effects[order[count // 2 :]].mean(dim=0)
        halves.append(spearman(one, other))
        overlaps.append(overlap(one, other))
    weights = torch.from_numpy(resamples(count, draws, seed=seed)).to(effects)
    again = [spearman(row @ effects / count, whole) for row in weights]
    return Stability(
        halves=float(np.mean(halves)),
        halves_interval=interval(halves),
        overlap=float(np.mean(overlaps)),
        bootstrap=interval(again),
        stored=spearman(whole, stored),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far rankings agree that were taken under different conditions: other wordings, other draws, another layer.

    Attributes:
        spearman: rank correlation of the mean effects, averaged over pairs of conditions.
        interval: its central 95% over bootstrap draws of the prompts. A draw holds about two thirds of the prompts, so
            the interval lies low: it may lie below ``spearman``.
        overlap: share of the strongest 5% under one condition that are among the strongest 5% under the other.
    """

    spearman: float
    interval: tuple[float, float]
    overlap: float


def agreement(
    conditions: Sequence[Float[Tensor, "n G"]], *, paired: bool, draws: int = 100, seed: int = 0
) -> Agreement:
    """Rank agreement between the mean effects of every two conditions.

    Args:
        conditions: the effects of each unit on each prompt, for each condition; two at least.
        paired: row i is the same query under every condition, and a bootstrap draw takes it everywhere or nowhere.
        draws: bootstrap draws.
        seed: of these.
    """
    counts = [len(effects) for effects in conditions]
    drawn = [resamples(count, draws, seed=seed if paired else seed + place) for place, count in enumerate(counts)]
    pairs = list(combinations(range(len(conditions)), 2))

    def mean_over_pairs(measure: Callable[[Tensor, Tensor], float], means: Sequence[Tensor]) -> float:
        return float(np.mean([measure(means[i], means[j]) for i, j in pairs]))

    again = []
    for number in range(draws):
        rows = (torch.from_numpy(each[number]) for each in drawn)
        means = [row.to(own) @ own / len(own) for row, own in zip(rows, conditions, strict=True)]
        again.append(mean_over_pairs(spearman, means))
    whole = [effects.mean(dim=0) for effects in conditions]
    return Agreement(
        spearman=mean_over_pairs(spearman, whole), interval=interval(again), overlap=mean_over_pairs(overlap, whole)
    )
