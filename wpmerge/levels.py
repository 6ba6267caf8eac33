"""How coefficients move in ``refine``: as a sum of what experts, blocks and groups do. Pure functions.

λ is a sum of levels: the start, a part of the whole expert, a part of the block, a part of the group itself. With n_l
the number of a level's coefficients, τ_l its weight and ∂_l U the gradient summed over what they share, a step moves
level l by

    a_l τ_l² n_l p ∂_l U / ‖∂U‖,    ‖∂U‖² = Σ_l a_l τ_l² n_l Σ p (∂_l U)²

so that its coefficients would move by τ_l on average if all of the gradient were in that level. p = 1, but for units
p[e,u] ∝ 1/‖Δ_e[u]‖ with mean 1. a_l = Σ p ∂_l U' ∂_l U'' / Σ p (∂_l U)², within [0, 1], is how far two halves of the
prompts agree, ∂U being their mean: 1 for what all prompts ask for, 0 for noise. What many units agree on moves them
together, and cheaply; what one unit alone shows moves it alone, as far as other prompts show it too.

Shape suffixes: E experts, G groups, B blocks.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wpmerge.arch import Layout
from wpmerge.coefficients import MAX_COEFFICIENT, Grouping, block_of_groups
from wpmerge.errors import check_ranges

Halves = tuple[Float[Tensor, "E G"], Float[Tensor, "E G"]]
"""A gradient on two halves of the prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineSettings:
    """The numbers of ``refine``.

    Attributes:
        steps: how many.
        batch: prompts per capability and step.
        rate: of the first step; it falls linearly to 0. 1 means coefficients move by about a level's weight.
        momentum: share of the last direction that is kept, in [0, 1).
        ridge: pull back to the start: share of the parts that a step of rate 1 takes away.
        expert_weight: τ of what a whole expert's coefficients do together.
        block_weight: τ of a block's.
        group_weight: τ of a group's own.
        check: steps between two looks at the held-out prompts.
        max_coefficient: λ_max.
        seed: of the batches.

    Raises:
        RecipeError: a number out of its range.
    """

    steps: int = 16
    batch: int = 8
    rate: float = 0.5
    momentum: float = 0.7
    ridge: float = 0.0
    expert_weight: float = 0.5
    block_weight: float = 0.2
    group_weight: float = 0.5
    check: int = 4
    max_coefficient: float = MAX_COEFFICIENT
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "steps": (0, 10_000),
            "batch": (1, 100_000),
            "rate": (1e-9, 100.0),
            "momentum": (0.0, 0.999),
            "ridge": (0.0, 1.0),
            "check": (1, 10_000),
        }
        check_ranges(self, ranges)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Levels:
    """How λ is a sum of parts, and how far each may move.

    Attributes:
        start: λ before the first step.
        block: group → its block's number.
        weights: τ² n of the whole expert, of blocks and of groups.
        ease: p, what a group's own part is multiplied by; 0 where an expert does not differ from the base.
        highest: λ_max.
    """

    start: Float[Tensor, "E G"]
    block: Int[Tensor, " G"]
    weights: tuple[float, float, float]
    ease: Float[Tensor, "E G"]
    highest: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """What the steps have added to the start."""

    expert: Float[Tensor, "E 1"]
    block: Float[Tensor, "E B"]
    group: Float[Tensor, "E G"]

    def plus(self, other: "Parts", factor: float) -> "Parts":
        """self + factor · other."""
        return Parts(
            expert=self.expert + factor * other.expert,
            block=self.block + factor * other.block,
            group=self.group + factor * other.group,
        )


def make_levels(
    settings: RefineSettings,
    layout: Layout,
    grouping: Grouping,
    norms: Float[Tensor, "E G"],
    start: Float[Tensor, "E G"],
) -> Levels:
    """The levels of a granularity: groups alone for "expert", expert and blocks for "block", all three otherwise.

    Args:
        settings: the levels' weights.
        layout: knows which block a group lies in.
        grouping: the groups.
        norms: ‖Δ_e[g]‖².
        start: λ before the first step.
    """
    block = block_of_groups(layout, grouping)
    experts, groups = norms.shape
    counts = (experts, experts * (int(block.max()) + 1), experts * groups)
    taus = [settings.expert_weight, settings.block_weight, settings.group_weight]
    if grouping.granularity in ("block", "expert"):
        taus[1] = 0.0
    if grouping.granularity == "expert":
        taus[0] = 0.0
    ease = (norms > 0).double()
    if grouping.granularity == "unit":
        ease = torch.where(norms > 0, norms.clamp_min(1e-30).rsqrt(), 0.0)
        ease = ease * groups / ease.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return Levels(
        start=start,
        block=block,
        weights=(taus[0] ** 2 * counts[0], taus[1] ** 2 * counts[1], taus[2] ** 2 * counts[2]),
        ease=ease,
        highest=settings.max_coefficient,
    )


def no_parts(levels: Levels) -> Parts:
    """Nothing added."""
    experts, groups = levels.start.shape
    return Parts(
        expert=levels.start.new_zeros(experts, 1),
        block=levels.start.new_zeros(experts, int(levels.block.max()) + 1),
        group=levels.start.new_zeros(experts, groups),
    )


def laid_out(levels: Levels, parts: Parts) -> Float[Tensor, "E G"]:
    """What parts add to each coefficient."""
    return parts.expert + parts.block[:, levels.block] + parts.group


def together(levels: Levels, parts: Parts) -> Float[Tensor, "E G"]:
    """λ."""
    return (levels.start + laid_out(levels, parts)).clamp(0.0, levels.highest)


def direction(levels: Levels, halves: Halves, coefficients: Float[Tensor, "E G"]) -> Parts:
    """The step of rate 1 along what two halves of the prompts agree on.

    What pushes a coefficient out of its bounds does not count.

    Args:
        levels: how far each may move.
        halves: the gradient on two halves of the prompts; their mean is followed, a level as far as they agree.
        coefficients: λ.
    """
    mean = (halves[0] + halves[1]) / 2
    outward = ((coefficients <= 0.0) & (mean < 0.0)) | ((coefficients >= levels.highest) & (mean > 0.0))
    followed, one, other = (_per_level(levels, each.masked_fill(outward, 0.0)) for each in (mean, *halves))
    ease = (torch.ones_like(followed[0]), torch.ones_like(followed[1]), levels.ease)
    weights, size = [], mean.new_zeros(())
    for weight, p, way, a, b in zip(levels.weights, ease, followed, one, other, strict=True):
        square = (p * way.square()).sum()
        agreed = ((p * a * b).sum() / square.clamp_min(1e-30)).clamp(0.0, 1.0)
        weights.append(weight * agreed)
        size = size + weight * agreed * square
    by = 1.0 / size.sqrt().clamp_min(1e-12)
    expert, block, group = (weight * p * way * by for weight, p, way in zip(weights, ease, followed, strict=True))
    return Parts(expert=expert, block=block, group=group)


def _per_level(levels: Levels, gradient: Float[Tensor, "E G"]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient summed over what an expert, a block and a group share."""
    blocks = gradient.new_zeros(len(gradient), int(levels.block.max()) + 1).index_add(1, levels.block, gradient)
    return gradient.sum(dim=1, keepdim=True), blocks, gradient
