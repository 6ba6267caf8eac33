"""The k-th largest of a stream of magnitudes, exactly, in memory that does not grow with the stream.

TIES needs it of every task vector. A sample brackets the answer; one pass over the stream counts what lies above and
below the bracket and keeps what lies inside, among which the answer is selected. Where the bracket missed, or holds
too much to be kept, the counts say where to look next, and a bisection over the float32 numbers ends the search.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Magnitudes = NDArray[np.float32]

SAMPLE = 2**16
KEPT_INSIDE = 2**19  # values kept in one pass: 2 MiB
_GUIDED_PASSES = 3  # after these, every other pass halves the interval
_BIN_BITS = 12
_PART = 2**16  # numbers that are put into bins at a time
_LARGEST = 0x7F800000  # the bits of infinity


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """What is kept: every magnitude above ``value``, and the first ``ties`` that equal it, by index."""

    value: float
    ties: int


def kept_count(density: float, numel: int) -> int:
    """How many entries a density keeps: max(1, ⌊density · n⌋), none at density 0."""
    return min(numel, max(1, int(density * numel))) if density > 0 and numel else 0


def threshold_of(magnitudes: Magnitudes, keep: int) -> Threshold:
    """The threshold that keeps exactly ``keep`` of some magnitudes held in memory; 1 <= keep <= their number.

    Counts over bins of the numbers' bits, then over the bins of one bin: unlike selection by pivots this does not mind
    that bfloat16 deltas repeat.
    """
    bits = magnitudes.view(np.uint32)
    while True:
        low, high = int(bits.min()), int(bits.max())
        shift = max(0, (high - low).bit_length() - _BIN_BITS)
        counts = np.zeros(((high - low) >> shift) + 1, np.intp)
        for part in _parts(bits):
            counts += np.bincount((part - np.uint32(low)) >> np.uint32(shift), minlength=len(counts))
        from_top = np.cumsum(counts[::-1])
        place = int(np.searchsorted(from_top, keep))  # the first bin from the top that reaches keep
        keep -= int(from_top[place - 1]) if place else 0
        chosen = len(from_top) - 1 - place
        if shift == 0:
            return Threshold(value=_number(low + chosen), ties=keep)
        bits = np.concatenate([part[(part - np.uint32(low)) >> np.uint32(shift) == chosen] for part in _parts(bits)])


def _parts(bits: NDArray[np.uint32]) -> list[NDArray[np.uint32]]:
    return [bits[start : start + _PART] for start in range(0, len(bits), _PART)]


class Selector:
    """The search for one threshold: :meth:`see` every block once, then :meth:`end_pass`, until that gives the answer.

    Magnitudes are compared as the integers that their bits spell: the order is the same, and one comparison tells
    whether one lies in the bracket.

    Args:
        keep: how many are kept, at least 1 and at most ``numel``.
        sample: some of the magnitudes; a good one saves passes, a bad one changes nothing else.
        numel: how many will be seen in a pass.
    """

    def __init__(self, keep: int, sample: Magnitudes, numel: int) -> None:
        self._keep, self._passes = keep, 0
        self._room: int  # how many more magnitudes may be kept in this pass; -1 where some could not be
        self._floor, self._ceiling = 0, _LARGEST  # the answer lies in [floor, ceiling]
        self._low, self._high = self._bracket(sample, keep / numel)  # where this pass looks
        self._reset()

    def see(self, magnitudes: Magnitudes, scratch: NDArray[np.bool_], spare: NDArray[np.uint32]) -> None:
        """Take in a block; ``scratch`` and ``spare`` are as long as it."""
        bits = magnitudes.view(np.uint32)
        over = int(np.count_nonzero(np.greater(bits, np.uint32(self._high), out=scratch)))
        np.subtract(bits, np.uint32(self._low), out=spare)  # wraps where it is below the bracket
        inside = int(np.count_nonzero(np.less_equal(spare, np.uint32(self._high - self._low), out=scratch)))
        self.take(over, inside, magnitudes[scratch] if self.collects and inside <= self._room else None)

    @property
    def bracket(self) -> tuple[int, int]:
        """The bits of the least and the largest magnitude that this pass looks for."""
        return self._low, self._high

    @property
    def collects(self) -> bool:
        """Whether the magnitudes inside the bracket are wanted, and not only their number."""
        return self._low != self._high and self._room >= 0

    def take(self, over: int, inside: int, kept: Magnitudes | None) -> None:
        """What :meth:`see` finds of a block, found elsewhere: how many lie above the bracket and inside, and these.

        ``kept`` is not copied; None where they are not wanted or more than there is room for.
        """
        self._over += over
        self._inside += inside
        if not inside or not self.collects:
            return
        if kept is not None and self._room >= inside:
            self._kept.append(kept)
            self._room -= inside
        else:
            self._room = -1  # from here on only counted

    def end_pass(self) -> Threshold | None:
        """The threshold, or None where another pass over the stream is needed."""
        between = self._over < self._keep <= self._over + self._inside
        if between:
            rank = self._keep - self._over
            if self._low == self._high:
                return Threshold(value=_number(self._low), ties=rank)
            if self._room >= 0:
                return threshold_of(np.concatenate(self._kept), rank)
            self._floor, self._ceiling = self._low, self._high
        elif self._keep <= self._over:
            self._floor = self._high + 1
        else:
            self._ceiling = self._low - 1
        if self._floor > self._ceiling:  # only where some are NaN
            return Threshold(value=0.0, ties=self._keep)
        self._passes += 1
        if between and self._kept and self._passes < _GUIDED_PASSES:
            kept = np.concatenate(self._kept)
            self._low, self._high = self._bracket(kept, (self._keep - self._over) / self._inside)
        elif self._passes < _GUIDED_PASSES:
            self._low, self._high = self._floor, self._ceiling
        elif self._passes % 2:
            self._low = self._high = (self._floor + self._ceiling) // 2
        else:
            self._low, self._high = self._floor, self._ceiling
        self._reset()
        return None

    def _bracket(self, sample: Magnitudes, share: float) -> tuple[int, int]:
        """Where the value that ``share`` of a sample lies above may be, wide enough for the sample's error."""
        size = len(sample)
        middle, margin = round((1 - share) * (size - 1)), round(1.6 * size**0.5)
        places = [max(0, middle - margin), min(size - 1, middle + margin)]
        low, high = (int(bits) for bits in np.partition(sample, places)[places].view(np.uint32))
        low = max(low, self._floor) if places[0] > 0 else self._floor
        high = min(high, self._ceiling) if places[1] < size - 1 else self._ceiling
        return (low, high) if low <= high else (self._floor, self._ceiling)

    def _reset(self) -> None:
        self._over = self._inside = 0
        self._room = KEPT_INSIDE
        self._kept: list[Magnitudes] = []


def _number(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))
