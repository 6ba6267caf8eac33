"""Which readout of a capability to rely on: the one whose unit scores foretell the behaviour on other prompts.

The rule: docs/method.md, section "Readouts".

Shape suffixes: G units.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.agreement import overlap, spearman
from wpmerge.anchor import HALVES
from wpmerge.errors import AnchorError
from wpmerge.estimators import EstimatorSettings, estimate
from wpmerge.models import Family
from wpmerge.pieces import Pieces
from wpmerge.readings import Case, Progress, ScoreSettings, make_reading, some_of
from wpmerge.recovery import Gap, measure_gap
from wpmerge.scores import Candidate, ReadoutName

CANDIDATES: tuple[ReadoutName, ...] = ("reference", "divergence", "anchor")
"""In the order in which they are preferred where they are as good."""
MARGIN = 0.05
"""Rank correlation by which a readout must be ahead of one that stands before it."""


class Worth(TypedDict):
    """A part of :class:`Candidate`: how far the halves agree."""

    halves: float | None
    overlap: float | None
    behaviour: float | None


def choose(
    family: Family, case: Case, settings: ScoreSettings, held_bytes: int, pieces: Pieces, tell: Progress
) -> list[Gap]:
    """Measure every candidate on two halves of the scored prompts.

    Args:
        family: the models.
        case: a capability that has an expert.
        settings: what was asked for; an anchor's layer is chosen on all prompts.
        held_bytes: bound on residual streams held at a time.
        pieces: keep the halves' scores.
        tell: told what is being done.

    Returns:
        The readouts that could be measured, the chosen one first: it bears the capability's name and ``choice``.

    Raises:
        AnchorError: none can be measured.
    """
    own, last = case.scored.name, family.layout.layers - 1
    gaps: list[Gap] = []
    refused: dict[ReadoutName, AnchorError] = {}
    halves: dict[ReadoutName, Float[Tensor, "2 G"]] = {}
    for number, name in enumerate(CANDIDATES):
        tell(f"{own}: reliability of {name}", number, len(CANDIDATES))
        try:
            gap = measure_gap(family, case, name, settings, held_bytes, first=False)
        except AnchorError as error:
            refused[name] = error
            continue
        gaps.append(gap)
        compute = partial(half_scores, family, gap, settings, held_bytes)
        halves[name] = pieces.tensors(f"halves-{own}-{name}", compute)["halves"]
    if not gaps:
        raise next(iter(refused.values()))
    usable = [gap.name for gap in gaps if not gap.accepted]
    worth = compare(halves, usable or list(halves))
    judged = [
        Candidate(
            readout=gap.name,
            usable=not gap.accepted,
            refused="accepted although unreliable" if gap.accepted else None,
            l_star=last if gap.anchor is None else gap.anchor.layer,
            gap_t=gap.t,
            **worth[gap.name],
        )
        for gap in gaps
    ]
    chosen = pick(judged)
    judged += [
        Candidate(readout=name, usable=False, refused=str(error.got or error.what)) for name, error in refused.items()
    ]
    choice = tuple(each.model_copy(update={"chosen": each.readout == chosen}) for each in judged)
    first = next(gap for gap in gaps if gap.name == chosen)
    return [replace(first, label=own, choice=choice), *(gap for gap in gaps if gap is not first)]


def half_scores(family: Family, gap: Gap, settings: ScoreSettings, held_bytes: int) -> dict[str, Float[Tensor, "2 G"]]:
    """Linear effects of the own expert's units on each half of the prompts, under ``halves``.

    An anchor is read along the direction of that half alone, at the layer that all prompts chose.
    """
    own, found = gap.case.own, []
    options = EstimatorSettings(kinds=settings.kinds, held_bytes=held_bytes)
    for number, half in enumerate(HALVES):
        part = some_of(gap.case, range(len(gap.case.starts))[half])
        anchor = None if gap.anchor is None else replace(gap.anchor, directions=gap.anchor.halves[number])
        reading = make_reading(family, part, anchor, settings, count=len(part.starts), name=gap.name)
        base, expert = family.weights[""], family.weights[own]
        (arrays,) = estimate("linear", family.engine, base, [expert], reading.rows, reading.readout, options)
        found.append(torch.cat([array.flatten() for array in arrays.values()]))
    return {"halves": torch.stack(found)}


def compare(
    halves: Mapping[ReadoutName, Float[Tensor, "2 G"]], counted: Sequence[ReadoutName]
) -> dict[ReadoutName, Worth]:
    """How far each candidate's halves agree, and each foretells the reference.

    Args:
        halves: a number per unit from each half.
        counted: usable candidates. Units count that moved and that all of these read: an anchor must not gain by
            reading fewer.
    """
    everything = torch.cat([halves[name] for name in counted])
    common = ~everything.isnan().any(dim=0) & (everything != 0).any(dim=0)
    reference = halves.get("reference")
    found: dict[ReadoutName, Worth] = {}
    for name, (one, other) in halves.items():
        found[name] = {
            "halves": _known(spearman(one[common], other[common])),
            "overlap": overlap(one[common], other[common]) if bool(common.any()) else None,
            "behaviour": None,
        }
        if reference is not None:
            ways = [
                spearman(own[common], its[common]) for own, its in zip((one, other), reference.flip(0), strict=True)
            ]
            found[name]["behaviour"] = _known(sum(ways) / 2)
    return found


def pick(judged: Sequence[Candidate]) -> ReadoutName:
    """The readout that best foretells the behaviour; one that is preferred stays unless it is behind by the margin.

    Where no reference could be measured, the readout whose halves agree most. Readouts that were accepted although
    unreliable count only if there is no other.
    """
    among = [each for each in judged if each.usable] or judged
    by_behaviour = any(each.behaviour is not None for each in among)
    worth = [each.behaviour if by_behaviour else each.halves for each in among]
    known = [-1.0 if value is None else value for value in worth]
    best = max(known)
    return next(each.readout for each, value in zip(among, known, strict=True) if value >= best - MARGIN)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
