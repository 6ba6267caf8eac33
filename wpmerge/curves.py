"""Rankings of units, the sets they choose, and the area under what the sets recover. Pure functions.

Definitions and sources: docs/method.md, section "What makes a ranking believed".

Shape suffixes: G units, n prompts, P points of a curve, B bootstrap draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of the moved parameters at which curves are read, MIB's (arXiv:2504.13151); 0 and 1 are base and expert."""
LARGEST_BIN = 8
"""Units of a layer and kind whose ‖Δ‖ count as alike: every eighth of them, or all where there are fewer than 16."""


def order_by(
    values: Float[Tensor, " G"], sizes: Float[Tensor, " G"], moved: Bool[Tensor, " G"]
) -> Int[Tensor, " moved"]:
    """The moved units, the largest value per parameter first, as the rule ``select`` takes them; NaN last.

    Args:
        values: of each unit.
        sizes: parameters of each unit.
        moved: where base and expert differ; the rest is left out.
    """
    density = torch.where(values.isnan(), -torch.inf, values.double() / sizes)
    order = density.argsort(descending=True, stable=True)
    return order[moved[order]]


def chosen(
    order: Int[Tensor, " moved"], sizes: Float[Tensor, " G"], shares: Sequence[float]
) -> list[Bool[Tensor, " G"]]:
    """For each share the units taken in order while they fit into that share of the ordered units' parameters.

    A unit too large for what is left is passed over; share 1 takes all, share 0 none.
    """
    ordered, found = sizes[order].tolist(), []
    total = sum(ordered)
    for share in shares:
        room = share * total + 0.5
        taken = []
        for place, size in enumerate(ordered):
            if size <= room:
                taken.append(place)
                room -= size
        mask = torch.zeros(len(sizes), dtype=torch.bool)
        mask[order[taken]] = True
        found.append(mask)
    return found


def strata(groups: Sequence[tuple[str, int]], norms: Float[Tensor, " G"]) -> Int[Tensor, " G"]:
    """Units that stand for one another in a random set: of one kind and layer, and alike in ‖Δ‖.

    Args:
        groups: kind and layer of each unit.
        norms: ‖Δ‖ of each unit; those of a group are cut into up to 8 bins of equal count, no fewer than 8 units each.

    Returns:
        A number per unit; equal numbers may change places.
    """
    members: dict[tuple[str, int], list[int]] = {}
    for unit, group in enumerate(groups):
        members.setdefault(group, []).append(unit)
    found, number = torch.zeros(len(groups), dtype=torch.int64), 0
    for units in members.values():
        index = torch.tensor(units)
        index = index[norms[index].argsort(stable=True)]
        bins = min(LARGEST_BIN, max(1, len(units) // LARGEST_BIN))
        for part in index.tensor_split(bins):
            found[part] = number
            number += 1
    return found


def matched(values: Float[Tensor, " G"], alike: Int[Tensor, " G"], *, seed: int) -> Float[Tensor, " G"]:
    """The same values dealt anew within strata: a random ranking with the layers, kinds and ‖Δ‖ of the real one."""
    chance = np.random.default_rng(seed)
    shuffled = torch.from_numpy(chance.permutation(len(values)))
    there, here = shuffled[alike[shuffled].argsort(stable=True)], alike.argsort(stable=True)
    dealt = values.clone()
    dealt[there] = values[here]
    return dealt


@dataclass(frozen=True, slots=True, kw_only=True)
class Area:
    """Areas of a curve of recovered fraction f over the share k of parameters, by trapezoids (MIB, arXiv:2504.13151).

    Attributes:
        cpr: ∫ f dk; larger is better for a transplant, smaller for a revert.
        cmd: ∫ |1 − f| dk; smaller is better for a transplant.
    """

    cpr: float
    cmd: float


def area(shares: Sequence[float], recovered: Sequence[float], *, ends: tuple[float, float] = (0.0, 1.0)) -> Area:
    """Both areas.

    Args:
        shares: increasing, between 0 and 1, without the ends.
        recovered: f at each share.
        ends: f at 0 and 1.
    """
    k = np.array([0.0, *shares, 1.0])
    f = np.array([ends[0], *recovered, ends[1]])
    return Area(cpr=float(np.trapezoid(f, k)), cmd=float(np.trapezoid(np.abs(1 - f), k)))


def recovered(
    items: Float[np.ndarray, "P n"],
    base: Float[np.ndarray, " n"],
    expert: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, "B n"] | None = None,
) -> Float[np.ndarray, "B P"]:
    """[F − F(base)] / [F(expert) − F(base)], ratios of means over prompts, each counted by a row of ``weights``."""
    w = np.ones((1, len(base))) if weights is None else weights
    found: Float[np.ndarray, "B P"] = (w @ (items - base).T) / (w @ (expert - base))[:, None]
    return found
