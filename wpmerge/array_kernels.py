"""Task arithmetic on bfloat16 in NumPy, as :mod:`wpmerge.kernels` has it: for merges too small to compile for.

Importing torch, or numba, takes longer than such a merge. The formulas, their order and every rounding are those of
:mod:`wpmerge.blocks`; tests hold the two equal to the bit on finite values, and what is not finite is only detected.
"""

import os

import numpy as np
from numpy.typing import NDArray

from wpmerge.checksum import part_of_checksum
from wpmerge.shards import write_all

TILE = 2**15  # elements worked on together: a few float32 arrays of them stay in the level-2 cache
# wpmerge.kernels compiles these in and keeps the code: who changes one touches that file too.
LARGEST_BFLOAT16 = 0x7F7F7FFF  # bits of the largest float32 that rounds to a finite bfloat16
UNREADABLE, UNWRITABLE = 0xFFFFFFFF, 0xFFFFFFFE

Numbers = NDArray[np.float32]
Bits = NDArray[np.uint16]
Places = NDArray[np.int64]


def write_add_weighted(
    descriptors: NDArray[np.int32],
    offsets: Places,
    stored: NDArray[np.uint16],
    start: int,
    stop: int,
    values: Numbers,
    first: Places,
    size: Places,
    inner: Places,
    scale: np.float32,
    target: int,
    offset: int,
    out: Bits,
    _keys: NDArray[np.uint64],
    _odds: NDArray[np.uint64],
    total: NDArray[np.uint64],
) -> int:
    """What the function of this name in :mod:`wpmerge.kernels` does; the checksum's keys are known here."""
    base, merged, delta = np.empty((3, TILE), np.float32)
    worst = 0
    for low in range(start, stop, TILE):
        n = min(TILE, stop - low)
        if not _read(descriptors, offsets, low, n, stored):
            return UNREADABLE
        b, m, d = base[:n], merged[:n], delta[:n]
        _widen(stored[0, :n], b)
        with np.errstate(all="ignore"):  # seen in the result
            for k in range(len(size)):
                term = d if k else m
                _widen(stored[1 + k, :n], term)
                term -= b
                term *= _factor(values[first[k] : first[k] + size[k]], int(inner[k]), low, n)
                if k:
                    m += term
            m *= scale
            m += b
        worst = max(worst, _round(m, d, out[:n]))
        if worst > LARGEST_BFLOAT16:
            return worst
        data = out[:n].view(np.uint8)
        total += np.uint64(part_of_checksum(2 * low, data))
        try:
            write_all(target, data.data, offset + 2 * low)
        except OSError:
            return UNWRITABLE
    return worst


def _read(descriptors: NDArray[np.int32], offsets: Places, start: int, n: int, stored: NDArray[np.uint16]) -> bool:
    """Elements ``start`` to ``start + n`` of every input; whether all could be read."""
    try:
        return all(
            os.preadv(descriptor, [stored[k, :n].data], offset + 2 * start) == 2 * n
            for k, (descriptor, offset) in enumerate(zip(descriptors.tolist(), offsets.tolist(), strict=True))
        )
    except OSError:
        return False


def _widen(bits: Bits, out: Numbers) -> None:
    np.left_shift(bits, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)


def _round(merged: Numbers, spare: Numbers, out: Bits) -> int:
    """The nearest bfloat16, ties to even, of what is finite; the largest magnitude before rounding, as bits."""
    bits, scratch = merged.view(np.uint32), spare.view(np.uint32)
    worst = int(np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=scratch).max(initial=0))
    np.right_shift(bits, np.uint32(16), out=scratch)
    scratch &= np.uint32(1)
    scratch += np.uint32(0x7FFF)
    scratch += bits
    np.right_shift(scratch, np.uint32(16), out=out, casting="unsafe")
    return worst


def _factor(values: Numbers, inner: int, low: int, n: int) -> Numbers:
    """values[(i // inner) % size] for i from ``low`` on; one number where there is one."""
    if len(values) == 1:
        return values
    first, last = low // inner, (low + n - 1) // inner
    taken: Numbers = values[np.arange(first, last + 1) % len(values)]
    if inner == 1:
        return taken
    bounds = (np.arange(first, last + 2) * inner).clip(low, low + n)
    return np.repeat(taken, np.diff(bounds))
