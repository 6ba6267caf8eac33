"""How retain sets bind ``refine``: a factor for each expert, once steps that know nothing of them are done.

What a retain set loses is curved: by its first order at one merge, steps miss it by far (docs/log.md, "A retain set
after the steps"). So it gets back what it lost, each expert's coefficients being multiplied with a factor below 1.
Steps that win back for the skills what they can, within what a set may lose, learn the set's own questions and add
nothing that others confirm (docs/log.md, "Factors alone keep to a retain set").

Shape suffixes: E experts, N merges, T terms of a quadratic.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.calibration import EPSILON, PENALTY, HeldOutReading, Standing
from wpmerge.readouts import LogProbReadout
from wpmerge.refining import Merging, Refined
from wpmerge.rows import pack
from wpmerge.tuning import TOKENS_PER_ROW

LEAST_EVALUATIONS = 16
"""Merges that may be run to find the factors, whatever was allowed."""
LOWERED = 0.15
"""By how much one factor alone is lowered, to see what it does."""
RADII = (0.3, 0.15, 0.07, 0.03)
"""How far around the best factors better ones are looked for."""
NEAR = 0.01
"""Factors as near as this to ones that were tried are not tried."""
NEAR_WEIGHS = 0.1
"""Distance at which a merge counts for a fit less than the best by a factor of √2."""


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
    allowed, run = max(LEAST_EVALUATIONS, evaluations), 0

    def evaluate(factors: Float[Tensor, " E"]) -> Standing:
        nonlocal run
        standing = merging.assess(factors[:, None] * refined.coefficients, judges)
        run += 1
        progress(run, allowed)
        return standing

    factors, standing = best_factors(evaluate, len(merging.experts), tolerance=tolerance, evaluations=allowed)
    if bool((factors == 1.0).all()):
        return replace(refined, standing=standing), run
    named = dict(zip(merging.experts, factors.tolist(), strict=True))
    coefficients = factors[:, None] * refined.coefficients
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
    tried: list[tuple[Float[Tensor, " E"], Standing]] = []

    def run(point: Float[Tensor, " E"]) -> bool:
        if len(tried) == evaluations or any(bool(((point - other).abs() < NEAR).all()) for other, _ in tried):
            return False
        tried.append((point, evaluate(point)))
        return True

    def worth(standing: Standing) -> float:
        return worth_beside(standing, tried[0][1], tolerance)

    def best() -> tuple[Float[Tensor, " E"], Standing]:
        return max(tried, key=lambda each: worth(each[1]))

    def promising(candidates: Float[Tensor, "N E"]) -> Float[Tensor, " E"]:
        said = _predicted(tried, best()[0], candidates)
        return candidates[max(range(len(said)), key=lambda number: worth(said[number]))]

    whole = torch.ones(experts, dtype=torch.float64)
    run(whole)
    if best()[1].excess(tolerance) == 0.0:
        return best()
    run(whole / 2)
    alike = promising(torch.linspace(0.0, 1.0, 101, dtype=torch.float64)[:, None].expand(-1, experts))
    run(alike)
    if experts > 1:
        for lowered in LOWERED * torch.eye(experts, dtype=torch.float64):
            run((alike - lowered).clamp(min=0.0))
    spread = torch.quasirandom.SobolEngine(experts, scramble=True, seed=0).draw(512, dtype=torch.float64) * 2 - 1
    around = torch.cat([radius * spread for radius in RADII])
    while run(promising((best()[0] + around).clamp(0.0, 1.0))):
        pass
    return best()


def worth_beside(standing: Standing, free: Standing, tolerance: float) -> float:
    """What a merge is worth beside the one without factors, ``free``: Σ_f log(ε + 1 − what R̂_f fell by).

    Before factors a merge may behave like an expert and yet find many of its replies unlikely, which is wording
    (docs/log.md, "What factors may cost"). So a skill counts by how much of the replies factors take, not of what was
    kept; what they give counts too. Less :data:`~wpmerge.calibration.PENALTY` for each tolerance that
    a retain set may have lost beyond the first.
    """
    left = (1.0 + _bounded(value) - _bounded(free.kept[name]) for name, value in standing.kept.items())
    return sum(math.log(EPSILON + each) for each in left) - PENALTY * standing.excess(tolerance)


def _bounded(retention: float) -> float:
    return min(1.0, max(0.0, retention))


def _predicted(
    tried: Sequence[tuple[Float[Tensor, " E"], Standing]],
    centre: Float[Tensor, " E"],
    candidates: Float[Tensor, "N E"],
) -> list[Standing]:
    """What quadratics through the merges that were run say of others; losses with their standard error."""
    points = torch.stack([point for point, _ in tried])
    weights = 1.0 / ((points - centre).square().sum(1) + NEAR_WEIGHS**2).sqrt()
    kept, lost = list(tried[0][1].kept), list(tried[0][1].lost)
    found = torch.tensor([[*each.kept.values(), *each.most.values()] for _, each in tried], dtype=torch.float64)
    fit = torch.linalg.lstsq(weights[:, None] * _terms(points), weights[:, None] * found, driver="gelsd").solution
    said = (_terms(candidates) @ fit).tolist()
    return [
        Standing(kept=dict(zip(kept, each, strict=False)), lost=dict(zip(lost, each[len(kept) :], strict=True)))
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
