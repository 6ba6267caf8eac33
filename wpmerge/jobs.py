"""What a merge makes: one job for each output tensor, and the blocks it is made in. No arithmetic, and no torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wpmerge.checkpoint import Checkpoint
from wpmerge.dtypes import Dtype
from wpmerge.shards import OutputTensor

BLOCK_ELEMENTS = 2**18
ALIGNED = 8  # blocks start at multiples of this many elements, so that their bytes are whole 64-bit words

Method = Literal["task_arithmetic", "linear", "ties", "dare_linear", "dare_ties"]
TRIMMED = ("ties",)
DROPPED = ("dare_linear", "dare_ties")
ELECTED = ("ties", "dare_ties")


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """What a term is multiplied by: one number (0-d) with ``axis`` None, or a vector along ``axis``; float32."""

    values: NDArray[np.float32]
    axis: int | None = None

    @classmethod
    def of(cls, number: float) -> "Factor":
        """One number, rounded to float32."""
        return cls(values=np.array(number, np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One input of an output tensor and what it is multiplied by.

    ``density`` is the share of its delta that TIES or DARE keep; ``seed`` decides DARE's choice.
    """

    checkpoint: Checkpoint
    tensor: str
    coefficient: Factor
    density: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """How one output tensor is made.

    With a base: base + scale · method(coefficients, term - base), its copy where there are no terms.
    Without: Σ coefficient · term.

    Attributes:
        normalize: of TIES and DARE-TIES: divide by the coefficients that agree with the elected sign.
        rescale: of DARE: divide what is kept by the density.
        scale: mergekit's lambda, where it is not already in the coefficients.
        parity: compute in this dtype, in the very steps of mergekit's task arithmetic, rounding after each.
        weights: for parity, the weights as the recipe states them, not rounded to float32.
    """

    output: OutputTensor
    base: tuple[Checkpoint, str] | None
    terms: tuple[Term, ...]
    method: Method = "task_arithmetic"
    normalize: bool = False
    rescale: bool = True
    scale: float = 1.0
    parity: Dtype | None = None
    weights: tuple[float, ...] = ()

    @property
    def needs_whole(self) -> bool:
        """Whether a statistic of the whole tensor is needed, so that its blocks are made in order by one thread."""
        return self.method in TRIMMED and any(term.density < 1 for term in self.terms)


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Element ranges that cut a tensor into whole rows, or rows into parts where a few rows are longer than a block.

    Each starts at a multiple of 8 elements.
    """
    numel = math.prod(shape)
    if numel == 0:
        return
    columns = numel // shape[0] if shape else 1
    least = columns * (ALIGNED // math.gcd(columns, ALIGNED))  # whole rows whose end is aligned
    step = (
        max(ALIGNED, BLOCK_ELEMENTS // ALIGNED * ALIGNED) if least > BLOCK_ELEMENTS else BLOCK_ELEMENTS // least * least
    )
    for start in range(0, numel, step):
        yield start, min(start + step, numel)
