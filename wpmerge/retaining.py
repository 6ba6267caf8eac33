"""How retain sets bind ``refine``: a factor for each expert, once steps that know nothing of them are done.

What a retain set loses is curved: by its first order at one merge, steps miss it by far (docs/log.md, "A retain set
after the steps"). So it gets back what it lost, each expert's coefficients being multiplied with a factor below 1.
Steps that win back for the skills what they can, within what a set may lose, learn the set's own questions and add
nothing that others confirm (docs/log.md, "Factors alone keep to a retain set").

Shape suffixes: E experts, G groups, N merges, T terms of a quadratic.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wpmerge.calibration import HeldOutReading, Standing, bounded
from wpmerge.errors import RecipeError
from wpmerge.readouts import LogProbReadout
from wpmerge.refining import Merging, Refined
from wpmerge.rows import pack
from wpmerge.tuning import TOKENS_PER_ROW

LEAST_EVALUATIONS = 16
"""Merges that may be run to find the factors, whatever was allowed; from six experts on two for each, and six."""
LOWERED = 0.15
"""By how much one factor alone is lowered, to see what it does."""
RADII = (0.03, 0.07, 0.15, 0.3)
"""How far around the best factors better ones are looked for."""
NEAR = 0.01
"""Factors as near as this to ones that were tried are not tried."""
WEIGHT_RADIUS = 0.1
"""Distance from the best factors at which a merge counts half in a fit."""


def keep_to_retain_sets(
    merging: Merging,
    refined: Refined,
    prompts: Mapping[str, HeldOutReading],
    held_out: Mapping[str, HeldOutReading],
    *,
    tolerance: float,
    evaluations: int,
    progress: Callable[[int, int], None],
) -> tuple[Refined, int]:
    """Multiply each expert's coefficients with a factor, so that no retain set loses more than the tolerance.

    Args:
        merging: what is merged.
        refined: where steps on the skills ended.
        prompts: what was scored; no step has seen the retain sets among it, so that they decide too.
        held_out: what decides, retain sets included.
        tolerance: nats per token below the base.
        evaluations: merges that may be run; at least :data:`LEAST_EVALUATIONS` may.
        progress: called with the merges run and allowed.

    Returns:
        The same with the best factors that were tried, all 1 among them, if any set may have lost more than the
        tolerance; and how many merges were run.
    """
    judges = {
        name: joined(each, prompts[name]) if name in prompts and each.retain else each
        for name, each in held_out.items()
    }
    experts, run = sorted(merging.experts), 0  # however they were ordered
    places = [experts.index(name) for name in merging.experts]
    allowed = max(LEAST_EVALUATIONS, 2 * len(experts) + 6, evaluations)

    def evaluate(factors: Float[Tensor, " E"]) -> Standing:
        nonlocal run
        standing = merging.assess(factors[places, None] * refined.coefficients, judges)
        run += 1
        progress(run, allowed)
        return standing

    factors, standing = best_factors(evaluate, len(experts), tolerance=tolerance, evaluations=allowed)
    if bool((factors == 1.0).all()):
        return replace(refined, standing=standing), run
    factors = factors[places]
    coefficients = factors[:, None] * refined.coefficients
    named = dict(zip(merging.experts, factors.tolist(), strict=True))
    return replace(refined, coefficients=coefficients, standing=standing, factors=named), run


def best_factors(
    evaluate: Callable[[Float[Tensor, " E"]], Standing], experts: int, *, tolerance: float, evaluations: int
) -> tuple[Float[Tensor, " E"], Standing]:
    """Search for factors by response surfaces (Box and Wilson 1951); :func:`worth_beside` says which are better.

    Every retention and loss is a smooth function of the factors, and 0 where all of them are: a quadratic without a
    constant is fitted to the merges that were run, those near the best one weighing most, and the merge that it says
    is best is run next. First come all factors 1, all of them one half, what the two say is best of those that are
    alike, and that with one factor after another lowered.

    Args:
        evaluate: factors → where that merge stands.
        experts: E.
        tolerance: nats per token that a retain set may lose.
        evaluations: merges that may be run, at least 1.

    Returns:
        The best factors that were tried, and their standing. All 1 where nothing may have lost more than the tolerance.
    """
    assert evaluations > 0, "no merge may be run"
    tried: list[tuple[Float[Tensor, " E"], Standing]] = []

    def worth(standing: Standing) -> float:
        return worth_beside(standing, tried[0][1], tolerance)

    def best() -> tuple[Float[Tensor, " E"], Standing]:
        return max(tried, key=lambda each: worth(each[1]))

    def try_out(point: Float[Tensor, " E"]) -> bool:
        if len(tried) == evaluations or any(_near(point[None], other)[0] for other, _ in tried):
            return False
        standing = evaluate(point)
        numbers = [*standing.kept.values(), *standing.most.values()]
        if not all(math.isfinite(number) for number in numbers):
            raise RecipeError(
                "a merge gives the held-out prompts a log-probability that is not a number",
                got=f"factors {point.tolist()}",
                mend="see that the experts' weights are finite",
            )
        tried.append((point, standing))
        return True

    def promising(candidates: Float[Tensor, "N E"]) -> Float[Tensor, " E"]:
        centre = best()[0]
        for point, _ in tried:
            if point is not centre:  # of others nothing is left to learn; the best may be the best there is
                candidates = candidates[~_near(candidates, point)]
        said = _predicted(tried, centre, candidates)
        return candidates[max(range(len(said)), key=lambda number: worth(said[number]))]

    whole = torch.ones(experts, dtype=torch.float64)
    try_out(whole)
    if best()[1].excess(tolerance) == 0.0:
        return best()
    try_out(whole / 2)
    alike = promising(torch.linspace(0.0, 1.0, 101, dtype=torch.float64)[:, None].expand(-1, experts))
    try_out(alike)
    if experts > 1:
        for lowered in LOWERED * torch.eye(experts, dtype=torch.float64):
            try_out((alike - lowered).clamp(min=0.0))
    spread = torch.quasirandom.SobolEngine(experts, scramble=True, seed=0).draw(512, dtype=torch.float64) * 2 - 1
    around = torch.cat([torch.zeros(1, experts, dtype=torch.float64), *(radius * spread for radius in RADII)])
    while try_out(promising((best()[0] + around).clamp(0.0, 1.0))):
        pass
    return best()


def _near(points: Float[Tensor, "N E"], other: Float[Tensor, " E"]) -> Bool[Tensor, " N"]:
    return ((points - other).abs() < NEAR).all(1)


def worth_beside(standing: Standing, free: Standing, tolerance: float) -> float:
    """What a merge is worth beside the one without factors, ``free``: Σ_f R̂_f(free) · log(ε + min(1, R̂_f)).

    A merge may behave like an expert and yet find half of its replies unlikely: the rest is wording (docs/log.md, "What
    factors may cost"). With these weights a little less of the replies counts alike for every skill, however much of
    them was kept, and a skill that is lost still costs much. Less :data:`~wpmerge.calibration.PENALTY` for each
    tolerance that a retain set may have lost beyond the first.
    """
    return standing.worth(tolerance, weights={name: bounded(value) for name, value in free.kept.items()})


def _predicted(
    tried: Sequence[tuple[Float[Tensor, " E"], Standing]],
    centre: Float[Tensor, " E"],
    candidates: Float[Tensor, "N E"],
) -> list[Standing]:
    """What quadratics through the merges that were run say of others; losses are what may have been lost."""
    points = torch.stack([point for point, _ in tried])
    weights = 1.0 / ((points - centre).square().sum(1) + WEIGHT_RADIUS**2).sqrt()
    kept, lost = list(tried[0][1].kept), list(tried[0][1].lost)
    found = torch.tensor([[*each.kept.values(), *each.most.values()] for _, each in tried], dtype=torch.float64)
    fit = torch.linalg.lstsq(weights[:, None] * _terms(points), weights[:, None] * found, driver="gelsd").solution
    said = (_terms(candidates) @ fit).tolist()
    return [
        Standing(
            kept=dict(zip(kept, each[: len(kept)], strict=True)), lost=dict(zip(lost, each[len(kept) :], strict=True))
        )
        for each in said
    ]


def _terms(points: Float[Tensor, "N E"]) -> Float[Tensor, "N T"]:
    """Factors, and products of two."""
    first, second = torch.triu_indices(points.shape[1], points.shape[1])
    return torch.cat([points, points[:, first] * points[:, second]], dim=1)


def joined(one: HeldOutReading, other: HeldOutReading) -> HeldOutReading:
    """The questions of two readings of a retain set as one."""
    first, second = one.readout, other.readout
    assert isinstance(first, LogProbReadout) and isinstance(second, LogProbReadout) and one.retain and other.retain
    readout = LogProbReadout(
        layer=first.layer,
        sequences=[*first.sequences, *second.sequences],
        starts=[*first.starts, *second.starts],
    )
    rows = pack(readout.sequences, tokens_per_row=TOKENS_PER_ROW)
    base_items = torch.cat([one.base_items, other.base_items])
    return HeldOutReading(readout=readout, rows=rows, base_items=base_items, expert_items=None)
