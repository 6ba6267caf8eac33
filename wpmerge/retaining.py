"""How retain sets bind ``refine``: a factor for each expert, once steps that know nothing of them are done.

What a retain set loses is curved: by its first order at one merge, steps miss it by far (docs/log.md, "A retain set
after the steps"). So it gets back what it lost, each expert's coefficients being multiplied with a factor below 1.
Steps that win back for the skills what they can, within what a set may lose, learn the set's own questions and add
nothing that others confirm (docs/log.md, "Factors alone keep to a retain set").

Shape suffixes: E experts, G groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

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
        The same with the best factors that were tried, all 1 among them, if any set may have lost more than the
        tolerance; and how many merges were run.
    """
    judges = {
        name: joined(each, prompts[name]) if name in prompts and each.retain else each
        for name, each in held_out.items()
    }
    experts, allowed, run = tuple(merging.experts), max(LEAST_EVALUATIONS, evaluations), 0
    whole = dict.fromkeys(experts, 1.0)

    def evaluate(factors: Mapping[str, float]) -> Standing:
        nonlocal run
        if run and factors == whole:
            return free
        standing = merging.assess(by_expert(merging, factors) * refined.coefficients, judges)
        run += 1
        progress(run, allowed)
        return standing

    free = evaluate(whole)
    if free.excess(tolerance) == 0.0:
        return replace(refined, standing=free), run
    common = Tunable(names=experts, high=1.0, grid=FACTORS, steps=())
    each = [Tunable(names=(name,), high=1.0) for name in sorted(experts)]  # however they were ordered
    factors, standing = search_numbers(
        whole, [common, *each], evaluate, lambda found: found.worth(tolerance), evaluations=allowed
    )
    coefficients = by_expert(merging, factors) * refined.coefficients
    return replace(refined, coefficients=coefficients, standing=standing, factors=factors), run


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
