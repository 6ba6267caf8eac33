"""How retain sets bind ``refine``: a factor for each expert, once steps that know nothing of them are done.

What a retain set loses is curved: by its first order at one merge, steps miss it by far (docs/log.md, "A retain set
after the steps"). So it gets back what it lost, each expert's coefficients being multiplied with a factor below 1.
Steps that win back for the skills what they can, within what a set may lose, learn the set's own questions and add
nothing that others confirm (docs/log.md, "Factors alone keep to a retain set").

Shape suffixes: E experts, G groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.calibration import HeldOutReading, Standing, Tunable, search_numbers
from wpmerge.readouts import LogProbReadout
from wpmerge.refining import Merging, Refined
from wpmerge.rows import pack
from wpmerge.tuning import TOKENS_PER_ROW

FACTORS = (0.35, 0.5, 0.65, 0.8, 1.0)
"""Of all experts alike, tried first."""
LEAST_EVALUATIONS = 16
"""Merges that may be run to find the factors, whatever was allowed."""


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
        The same, with its factors, if any set may have lost more than the tolerance; and how many merges were run.
    """
    judges = {
        name: joined(each, prompts[name]) if name in prompts and each.retain else each
        for name, each in held_out.items()
    }
    allowed = max(LEAST_EVALUATIONS, evaluations)
    held = hold_back(merging, refined.coefficients, judges, tolerance=tolerance, evaluations=allowed, progress=progress)
    return (
        replace(
            refined,
            coefficients=by_expert(merging, held.factors) * refined.coefficients,
            standing=held.standing,
            factors=held.factors if held.needed else {},
        ),
        held.evaluations,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What keeps to the retain sets.

    Attributes:
        factors: expert → within [0, 1].
        standing: of the merge with them.
        needed: whether a retain set may have lost more than the tolerance without them.
        evaluations: merges that were run.
    """

    factors: Mapping[str, float]
    standing: Standing
    needed: bool
    evaluations: int


def hold_back(
    merging: Merging,
    coefficients: Float[Tensor, "E G"],
    readings: Mapping[str, HeldOutReading],
    *,
    tolerance: float,
    evaluations: int,
    progress: Callable[[int, int], None],
) -> Held:
    """Find a factor for each expert at which no retain set loses more than the tolerance, and skills keep most.

    Args:
        merging: what is merged.
        coefficients: λ before the factors.
        readings: held-out prompts of the skills, and the retain sets.
        tolerance: nats per token below the base.
        evaluations: merges that may be run.
        progress: called with the merges run and allowed.

    Returns:
        The best factors that were tried, all 1 among them; no others are tried if nothing is lost beyond the tolerance.
    """
    experts, done = tuple(merging.experts), 0
    whole = dict.fromkeys(experts, 1.0)

    def evaluate(factors: Mapping[str, float]) -> Standing:
        nonlocal done
        if done and factors == whole:
            return free
        standing = merging.assess(by_expert(merging, factors) * coefficients, readings)
        done += 1
        progress(done, evaluations)
        return standing

    free = evaluate(whole)
    needed = free.excess(tolerance) > 0.0
    if not needed:
        return Held(factors=whole, standing=free, needed=needed, evaluations=done)
    common = Tunable(names=experts, high=1.0, grid=FACTORS, steps=())
    each = [Tunable(names=(name,), high=1.0) for name in sorted(experts)]  # however they were ordered
    factors, standing = search_numbers(
        whole, [common, *each], evaluate, lambda found: found.worth(tolerance), evaluations=evaluations
    )
    return Held(factors=factors, standing=standing, needed=needed, evaluations=done)


def by_expert(merging: Merging, factors: Mapping[str, float]) -> Float[Tensor, "E 1"]:
    """Factors in the order of the experts."""
    return torch.tensor([[factors[name]] for name in merging.experts], dtype=torch.float64)


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
