"""The thresholds of TIES' trim: one pass over a tensor's base and terms together, seldom a second."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from wpmerge.jobs import Job, blocks
from wpmerge.selection import SAMPLE, Magnitudes, Selector, Threshold, kept_count, threshold_of

_RUN = 2048  # elements that a sample takes from one place

Look = Callable[[Sequence[int], int, int], Iterable[Magnitudes]]
"""|term - base| of some terms, by number, of elements from the second argument to the third; one at a time is valid."""
See = Callable[[Mapping[int, Selector], int, int], None]
"""Shows the same to the terms' searches, by number."""


class Trim:
    """What is kept of a term: magnitudes above ``value``, and the next ``ties`` that equal it, as blocks pass."""

    def __init__(self, threshold: Threshold) -> None:
        self.value, self.ties = threshold.value, threshold.ties


def find_trims(job: Job, look: Look, see: See) -> list[Trim | None]:
    """The trim of each of a job's terms; None stands for a term of which all is kept, or nothing.

    Only TIES trims: under other methods nothing is looked at.
    """
    found: list[Trim | None] = [None] * len(job.terms)
    if not job.needs_whole:
        return found
    numel = math.prod(job.output.shape)
    keeps = {i: kept_count(term.density, numel) for i, term in enumerate(job.terms)}
    keeps = {i: keep for i, keep in keeps.items() if 0 < keep < numel}
    if numel <= SAMPLE:
        for (i, keep), magnitudes in zip(keeps.items(), look(list(keeps), 0, numel), strict=True):
            found[i] = Trim(threshold_of(magnitudes, keep))
        return found
    samples = _samples(look, numel, list(keeps)) if keeps else {}
    searches = {i: Selector(keep, samples[i], numel) for i, keep in keeps.items()}
    while searches:
        for start, stop in blocks(job.output.shape):
            see(searches, start, stop)
        for i, search in list(searches.items()):
            if (threshold := search.end_pass()) is not None:
                found[i] = Trim(threshold)
                del searches[i]
    return found


def _samples(look: Look, numel: int, wanted: Sequence[int]) -> dict[int, Magnitudes]:
    """Magnitudes from short runs spread over the tensor at uneven distances, so that no column is favoured."""
    assert numel > SAMPLE >= _RUN
    runs = SAMPLE // _RUN
    parts: dict[int, list[Magnitudes]] = {i: [] for i in wanted}
    for number in range(runs):
        start = int((number + number * 0.6180339887 % 1) / runs * (numel - _RUN))
        for i, found in zip(wanted, look(wanted, start, start + _RUN), strict=True):
            parts[i].append(found.copy())
    return {i: np.concatenate(found) for i, found in parts.items()}
