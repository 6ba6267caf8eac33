"""A checksum that is the same in whatever order, blocks and threads a tensor is written, at the speed of memory.

dot64 of a tensor: its bytes in row-major order, padded with zeros to whole little-endian 64-bit words w_i, give
Σ w_i · key(i mod 2^15) · odd(i div 2^15) mod 2^64, key(i) = splitmix64(i) or 1, odd(j) = 2 · splitmix64(2^32 + j) + 1
(splitmix64: Steele, Lea and Flood 2014, figure 1, of seed i). It finds damage and mix-ups; it is no signature.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from wpmerge.tensorfile import bytes_of

if TYPE_CHECKING:
    from torch import Tensor

PERIOD = 2**15
_MASK64 = 2**64 - 1


class Checksum:
    """The dot64 of one tensor, fed with blocks in any order and from several threads."""

    def __init__(self) -> None:
        self._total = 0
        self._lock = threading.Lock()

    def add(self, start: int, block: Shaped[Tensor, " n"]) -> None:
        """Take in a flat block that begins at byte ``start`` of the tensor, a multiple of 8."""
        self.add_bytes(start, bytes_of(block))

    def add_bytes(self, start: int, data: NDArray[np.uint8]) -> None:
        """The same, of the block's bytes."""
        self.add_part(part_of_checksum(start, data))

    def add_part(self, total: int) -> None:
        """Take in what some part of the tensor adds to the sum."""
        with self._lock:
            self._total = (self._total + total) & _MASK64

    def text(self) -> str:
        """``dot64:`` and 16 hexadecimal digits."""
        return f"dot64:{self._total:016x}"


def part_of_checksum(start: int, data: NDArray[np.uint8]) -> int:
    """What some bytes add to a tensor's sum, from byte ``start`` on, a multiple of 8."""
    if start % 8:
        raise ValueError(f"a block begins at byte {start}, which is no multiple of 8")
    whole = len(data) // 8 * 8
    total = _total(start // 8, data[:whole].view(np.uint64))
    if whole < len(data):
        tail = np.zeros(8, np.uint8)
        tail[: len(data) - whole] = data[whole:]
        total += _total((start + whole) // 8, tail.view(np.uint64))
    return total & _MASK64


def checksum(tensor: Shaped[Tensor, "..."]) -> str:
    """The dot64 of a tensor in memory."""
    made = Checksum()
    made.add(0, tensor.reshape(-1))
    return made.text()


def splitmix64(seed: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The first output of the splitmix64 generator for each seed."""
    with np.errstate(over="ignore"):
        z = seed + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


Words = NDArray[np.uint64]
KEYS: Words = splitmix64(np.arange(PERIOD, dtype=np.uint64)) | np.uint64(1)  # odd: no bit of a word is lost


def odd_numbers(nbytes: int) -> Words:
    """odd(j) for at least the periods that a tensor of some bytes begins."""
    return _odd_numbers(1 << (nbytes // (8 * PERIOD)).bit_length())


@lru_cache(maxsize=64)
def _odd_numbers(periods: int) -> Words:
    return np.uint64(2) * splitmix64(np.uint64(2**32) + np.arange(periods, dtype=np.uint64)) + np.uint64(1)


def _total(first: int, words: Words) -> int:
    total, done = 0, 0
    odds = odd_numbers(8 * (first + len(words)))
    while done < len(words):
        period, place = divmod(first + done, PERIOD)
        part = words[done : done + PERIOD - place]
        total += int(odds[period]) * int(np.dot(part, KEYS[place : place + len(part)]))
        done += len(part)
    return total & _MASK64
