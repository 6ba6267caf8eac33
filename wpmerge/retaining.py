"""How retain sets bind ``refine``, after steps that know nothing of them: a factor for each expert, then careful steps.

What a retain set loses is curved: by its first order at one merge, steps as long as those on the skills miss it by far
(docs/log.md, "A retain set after the steps"). So it first gets back what it lost, each expert's coefficients being
multiplied with a factor below 1; short steps then win back for the skills what they can, and factors near 1 make up
for what the set has lost in them.

Shape suffixes: E experts, G groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.calibration import STEPS, HeldOutReading, Standing, Tunable, search_numbers
from wpmerge.levels import RefineSettings
from wpmerge.readings import Progress
from wpmerge.readouts import LogProbReadout
from wpmerge.refining import Kept, Merging, Refined, refine
from wpmerge.rows import pack
from wpmerge.tuning import TOKENS_PER_ROW

FACTORS = (0.35, 0.5, 0.65, 0.8, 1.0)
"""Of all experts alike, tried first."""
LEAST_EVALUATIONS = 16
"""Merges that may be run to find the first factors, whatever was allowed."""
AGAIN = 12
"""Merges that may be run to find factors after the careful steps."""
FINE = ((0.7, 0.8, 0.9, 0.95, 1.0), (0.05, 0.025))
"""Factors after the careful steps: of all experts alike, and how far one expert's is then moved."""
RATE = 0.08
"""Of the first step that keeps to the retain sets."""
LENT = 2.0
"""Tolerances that a retain set may lose while these steps are taken: factors bring back what is too much."""


def keep_to_retain_sets(
    merging: Merging,
    refined: Refined,
    prompts: Mapping[str, HeldOutReading],
    held_out: Mapping[str, HeldOutReading],
    settings: RefineSettings,
    *,
    evaluations: int,
    progress: Progress,
) -> tuple[Refined, int]:
    """Change what steps on the skills have found, so that no retain set loses more than the tolerance.

    Args:
        merging: what is merged.
        refined: where those steps ended.
        prompts: per capability and retain set what steps are taken on.
        held_out: what decides, retain sets included.
        settings: of the steps; as many are taken again, at a rate of at most :data:`RATE`.
        evaluations: merges that may be run to find the first factors; at least :data:`LEAST_EVALUATIONS` may.
        progress: told what is being done.

    Returns:
        The same if no set may have lost more than the tolerance, and how many merges were run. What the sets have lost
        is read on the prompts that decide either way: see :func:`share_out`.
    """
    steps_on, judges = share_out(prompts, held_out)
    held = hold_back(
        merging,
        refined.coefficients,
        judges,
        tolerance=settings.tolerance,
        evaluations=max(LEAST_EVALUATIONS, evaluations),
        progress=lambda done, total: progress("keeping to the retain sets", done, total),
    )
    run, factors, later = held.evaluations + 1, held.factors, torch.zeros_like(refined.coefficients)
    if held.needed and settings.steps:
        start = by_expert(merging, factors) * refined.coefficients
        careful = replace(settings, rate=min(RATE, settings.rate), tolerance=LENT * settings.tolerance)
        found = refine(
            merging,
            start,
            steps_on,
            judges,
            careful,
            progress=lambda done, total: progress("refining within the retain sets", done, total),
        )
        again = hold_back(
            merging,
            found.coefficients,
            judges,
            tolerance=settings.tolerance,
            evaluations=AGAIN,
            progress=lambda done, total: progress("keeping to the retain sets again", done, total),
            fine=True,
        )
        run += len(found.checks) + again.evaluations
        if again.standing.worth(settings.tolerance) > held.standing.worth(settings.tolerance):
            factors = {name: held.factors[name] * again.factors[name] for name in held.factors}
            later = by_expert(merging, again.factors) * (found.coefficients - start)
    coefficients = by_expert(merging, factors) * refined.coefficients + later
    return (
        replace(
            refined,
            coefficients=coefficients,
            standing=merging.assess(coefficients, judges),
            kept=Kept(factors=factors, later=later) if held.needed else None,
        ),
        run,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What keeps to the retain sets.

    Attributes:
        factors: expert → within [0, 1].
        standing: of the merge with them.
        needed: whether a retain set has lost more than the tolerance without them.
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
    fine: bool = False,
) -> Held:
    """Find a factor for each expert at which no retain set loses more than the tolerance, and skills keep most.

    Args:
        merging: what is merged.
        coefficients: λ before the factors.
        readings: held-out prompts of the skills, and the retain sets.
        tolerance: nats per token below the base.
        evaluations: merges that may be run.
        progress: called with the merges run and allowed.
        fine: look near 1 only.

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
    grid, steps = FINE if fine else (FACTORS, STEPS)
    common = Tunable(names=experts, high=1.0, grid=grid, steps=())
    each = [Tunable(names=(name,), high=1.0, steps=steps) for name in sorted(experts)]  # however they were ordered
    factors, standing = search_numbers(
        whole, [common, *each], evaluate, lambda found: found.worth(tolerance), evaluations=evaluations
    )
    return Held(factors=factors, standing=standing, needed=needed, evaluations=done)


def by_expert(merging: Merging, factors: Mapping[str, float]) -> Float[Tensor, "E 1"]:
    """Factors in the order of the experts."""
    return torch.tensor([[factors[name]] for name in merging.experts], dtype=torch.float64)


def share_out(
    prompts: Mapping[str, HeldOutReading], held_out: Mapping[str, HeldOutReading]
) -> tuple[dict[str, HeldOutReading], dict[str, HeldOutReading]]:
    """Keep every other question of a retain set from the steps, for those that decide.

    Steps learn the questions that they are taken on: what a set loses is known by others alone. Two wordings of one
    question may fall on either side.

    Args:
        prompts: per capability and retain set what steps may be taken on.
        held_out: what decides.

    Returns:
        What steps are taken on, and what decides.
    """
    steps_on, judges = dict(prompts), dict(held_out)
    for name, each in prompts.items():
        if each.retain:
            steps_on[name] = _some(each, range(0, each.readout.items, 2))
            if len(kept := range(1, each.readout.items, 2)) and name in held_out:
                judges[name] = _joined(held_out[name], _some(each, kept))
    return steps_on, judges


def _some(reading: HeldOutReading, items: Sequence[int]) -> HeldOutReading:
    """Some of a retain set's questions."""
    assert isinstance(reading.readout, LogProbReadout) and reading.retain
    return _retained(reading.readout.some(items), reading.base_items[list(items)])


def _joined(one: HeldOutReading, other: HeldOutReading) -> HeldOutReading:
    """The questions of two readings of one retain set as one."""
    first, second = one.readout, other.readout
    assert isinstance(first, LogProbReadout) and isinstance(second, LogProbReadout) and one.retain and other.retain
    readout = LogProbReadout(
        layer=first.layer,
        sequences=[*first.sequences, *second.sequences],
        starts=[*first.starts, *second.starts],
    )
    return _retained(readout, torch.cat([one.base_items, other.base_items]))


def _retained(readout: LogProbReadout, base_items: Float[Tensor, " items"]) -> HeldOutReading:
    rows = pack(readout.sequences, tokens_per_row=TOKENS_PER_ROW)
    return HeldOutReading(readout=readout, rows=rows, base_items=base_items, expert_items=None)
