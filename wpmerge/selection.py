"""The k-th largest of a stream of magnitudes, exactly, in memory that does not grow with the stream.

TIES needs it of every task vector. A sample brackets the answer; one pass over the stream counts what lies above and
below the bracket and keeps what lies inside, among which the answer is selected. Where the bracket missed, or holds
too much to be kept, the counts say where to look next, and a bisection over the float32 numbers ends the search.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Magnitudes = NDArray[np.float32]

SAMPLE = 2**15
KEPT_INSIDE = 2**21  # values kept in one pass: 8 MiB
_GUIDED_PASSES = 3  # after these, bisection alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """What is kept: every magnitude above ``value``, and the first ``ties`` that equal it, by index."""

    value: float
    ties: int


def kept_count(density: float, numel: int) -> int:
    """How many entries a density keeps: max(1, ⌊density · n⌋), none at density 0."""
    return min(numel, max(1, int(density * numel))) if density > 0 and numel else 0


def threshold_of(magnitudes: Magnitudes, keep: int) -> Threshold:
    """The threshold that keeps exactly ``keep`` of some magnitudes held in memory; 1 <= keep <= their number."""
    place = len(magnitudes) - keep
    value = np.partition(magnitudes, place)[place]
    return Threshold(value=float(value), ties=keep - int(np.count_nonzero(magnitudes > value)))


class Selector:
    """The search for one threshold: :meth:`see` every block once, then :meth:`end_pass`, until that gives the answer.

    Args:
        keep: how many are kept, at least 1 and at most ``numel``.
        sample: some of the magnitudes; a good one saves passes, a bad one changes nothing else.
        numel: how many will be seen in a pass.
    """

    def __init__(self, keep: int, sample: Magnitudes, numel: int) -> None:
        self._keep, self._passes = keep, 0
        self._floor, self._ceiling = np.float32(0), np.float32(np.inf)  # the answer lies in [floor, ceiling]
        self._low: np.float32
        self._high: np.float32  # this pass looks between them
        self._from_floor, self._over_ceiling = numel, 0  # how many are >= floor, how many > ceiling
        self._bracket(sample, keep / numel)
        self._reset()

    def see(self, magnitudes: Magnitudes, scratch: NDArray[np.bool_], spare: NDArray[np.bool_]) -> None:
        """Take in a block; ``scratch`` and ``spare`` are as long as it."""
        over = _count(np.greater(magnitudes, self._high, out=scratch))
        from_high = _count(np.greater_equal(magnitudes, self._high, out=scratch))
        self._over_high += over
        self._from_high += from_high
        if self._low == self._high:
            return
        self._from_low += _count(np.greater_equal(magnitudes, self._low, out=scratch))
        over_low = _count(np.greater(magnitudes, self._low, out=scratch))
        self._over_low += over_low
        if over_low == from_high or self._kept + over_low - from_high > KEPT_INSIDE:
            self._complete &= over_low == from_high
            return
        np.logical_and(scratch, np.less(magnitudes, self._high, out=spare), out=scratch)
        inside = magnitudes[scratch]
        self._inside.append(inside)
        self._kept += len(inside)

    def end_pass(self) -> Threshold | None:
        """The threshold, or None where another pass over the stream is needed."""
        keep = self._keep
        if self._low == self._high:
            self._over_low, self._from_low = self._over_high, self._from_high
        if self._over_high < keep <= self._from_high:
            return Threshold(value=float(self._high), ties=keep - self._over_high)
        if self._over_low < keep <= self._from_low:
            return Threshold(value=float(self._low), ties=keep - self._over_low)
        inside = np.concatenate(self._inside) if self._inside else np.empty(0, np.float32)
        if self._from_high < keep <= self._over_low and self._complete:
            return threshold_of(inside, keep - self._from_high)
        self._narrow(inside)
        if self._floor > self._ceiling:  # only where some are NaN, which no count sees
            return Threshold(value=0.0, ties=keep)
        self._reset()
        return None

    def _narrow(self, inside: Magnitudes) -> None:
        self._passes += 1
        between = False
        if self._keep <= self._over_high:
            self._floor, self._from_floor = np.nextafter(self._high, np.float32(np.inf)), self._over_high
        elif self._keep > self._from_low:
            self._ceiling, self._over_ceiling = np.nextafter(self._low, np.float32(-1)), self._from_low
        else:
            between = True
            self._floor, self._from_floor = np.nextafter(self._low, np.float32(np.inf)), self._over_low
            self._ceiling, self._over_ceiling = np.nextafter(self._high, np.float32(-1)), self._from_high
        count = self._from_floor - self._over_ceiling
        if count <= KEPT_INSIDE:
            self._low, self._high = self._floor, self._ceiling
        elif between and self._passes < _GUIDED_PASSES and len(inside):
            self._bracket(inside, (self._keep - self._over_ceiling) / count)
        else:
            bits = [int(np.float32(end).view(np.int32)) for end in (self._floor, self._ceiling)]
            self._low = self._high = np.int32(sum(bits) // 2).view(np.float32)

    def _bracket(self, sample: Magnitudes, share: float) -> None:
        """A bracket around the value that ``share`` of a sample lies above, wide enough for the sample's error."""
        size = len(sample)
        middle, margin = round((1 - share) * (size - 1)), round(4 * size**0.5)
        places = [max(0, middle - margin), min(size - 1, middle + margin)]
        low, high = np.partition(sample, places)[places]
        self._low = np.maximum(low, self._floor) if places[0] > 0 else self._floor
        self._high = np.minimum(high, self._ceiling) if places[1] < size - 1 else self._ceiling

    def _reset(self) -> None:
        self._over_high = self._from_high = self._over_low = self._from_low = self._kept = 0
        self._complete: bool = True
        self._inside: list[Magnitudes] = []


def _count(mask: NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(mask))
