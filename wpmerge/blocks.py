"""One block of one output tensor: read it from every input, combine in float32, round once. Allocates nothing.

The formulas are those of :mod:`wpmerge.operators`, written in place on a thread's buffers; tests hold the two equal to
the bit. Each product and each sum is rounded on its own (no fused multiply-add): the bits are then mergekit's, and do
not depend on where a processor's vectors end.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from wpmerge.checkpoint import Checkpoint
from wpmerge.errors import RecipeError
from wpmerge.operators import fill_random_mask
from wpmerge.plan import Coefficient
from wpmerge.selection import SAMPLE, Magnitudes, Selector, Threshold, kept_count, threshold_of
from wpmerge.shards import OutputTensor
from wpmerge.tensorfile import check_finite
from wpmerge.workspace import Workspace

BLOCK_ELEMENTS = 2**18
ALIGNED = 8  # blocks start at multiples of this many elements, so that their bytes are whole 64-bit words
_RUN = 2048  # elements that a sample takes from one place

Method = Literal["task_arithmetic", "linear", "ties", "dare_linear", "dare_ties"]
_TRIMMED = ("ties",)
_DROPPED = ("dare_linear", "dare_ties")
_ELECTED = ("ties", "dare_ties")


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One input of an output tensor and what it is multiplied by.

    ``density`` is the share of its delta that TIES or DARE keep; ``seed`` decides DARE's choice.
    """

    checkpoint: Checkpoint
    tensor: str
    coefficient: Coefficient
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
    parity: torch.dtype | None = None
    weights: tuple[float, ...] = ()

    @property
    def needs_whole(self) -> bool:
        """Whether a statistic of the whole tensor is needed, so that its blocks are made in order by one thread."""
        return self.method in _TRIMMED and any(term.density < 1 for term in self.terms)


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


class TensorMerge:
    """The making of one output tensor, block by block.

    Args:
        job: what to make.
        workspace: the calling thread's.
        allow_nan: let values pass that are not finite.
        trims: what :func:`find_trims` gives, where it is known already.
    """

    def __init__(
        self, job: Job, workspace: Workspace, *, allow_nan: bool = False, trims: Sequence["Trim | None"] | None = None
    ) -> None:
        self._job, self._workspace, self._allow_nan = job, workspace, allow_nan
        self._trims = find_trims(job, workspace) if trims is None else trims

    def block(self, start: int, stop: int) -> Shaped[Tensor, " n"]:
        """Elements ``start`` to ``stop`` in the output dtype, valid until the next block.

        Where the job needs the whole tensor, blocks must be asked for in order.

        Raises:
            CheckpointError: an input is not finite there.
            RecipeError: the result is not, though the inputs are: it overflows the output dtype.
        """
        job, work = self._job, self._workspace
        dtype = job.output.dtype
        if not dtype.is_floating_point:
            assert job.base is not None
            return work.stored(*job.base, start, stop)
        copied = job.base is not None and not job.terms and job.base[0].tensors[job.base[1]].dtype == dtype
        if copied and job.base is not None:
            merged = work.stored(*job.base, start, stop)
        elif job.parity is not None:
            merged = _parity(job, work, start, stop, job.parity).to(dtype)
        else:
            combined = self._combine(start, stop)
            merged = work.buffer("merged", stop - start, dtype).copy_(combined) if dtype != torch.float32 else combined
            # Finite squares make every value finite in any of the dtypes but float16; a value that is not finite in
            # any input, even times 0, makes the result so. One pass serves all these checks.
            squares = float(torch.dot(combined, combined))
            if squares < (math.inf if dtype != torch.float16 else 2.0**31):
                return merged
        if not self._allow_nan and not math.isfinite(float(merged.sum(dtype=torch.float64))):
            _explain_not_finite(job, merged, start, stop)
        return merged

    def _combine(self, start: int, stop: int) -> Float[Tensor, " n"]:
        job, work = self._job, self._workspace
        base = work.floats("base", *job.base, start, stop) if job.base else None
        if base is not None and not job.terms:
            return base
        coefficients = [_Factor(term.coefficient, job.output.shape, start, stop) for term in job.terms]
        total = work.buffer("total", stop - start)
        weighted = []
        for i, (term, coefficient, trim) in enumerate(zip(job.terms, coefficients, self._trims, strict=True)):
            elected = job.method in _ELECTED
            slot: object = ("term", i) if elected else "term" if i else "total"
            delta = work.floats(slot, term.checkpoint, term.tensor, start, stop)
            if base is not None:
                delta.sub_(base)
            if trim is not None:
                trim.apply(delta, work)
            elif job.method in _TRIMMED and term.density <= 0:
                delta.mul_(0.0)  # not filled: what is not finite must be seen
            elif job.method in _DROPPED and term.density < 1:
                _drop(delta, term, work, start, rescale=job.rescale)
            coefficient.multiply(delta)
            if elected:
                weighted.append(delta)
            elif i:
                total.add_(delta)
        if weighted:
            _elect(weighted, coefficients, total, work, normalize=job.normalize)
        if job.scale != 1:
            total.mul_(job.scale)
        return total if base is None else base.add_(total)


@dataclass(frozen=True, slots=True)
class _Factor:
    """A coefficient over one block, and how to multiply the block by it."""

    coefficient: Coefficient
    shape: tuple[int, ...]
    start: int
    stop: int

    def multiply(self, block: Float[Tensor, " n"]) -> None:
        """``block`` times the coefficient, in place."""
        values, axis = self.coefficient.values, self.coefficient.axis
        if axis is None:
            number = values.item()
            if number != 1:
                block.mul_(number)
            return
        columns = math.prod(self.shape[1:])
        if len(self.shape) == 2 and columns and self.start % columns == 0 and self.stop % columns == 0:
            view = block.view(-1, columns)
            first = self.start // columns
            view.mul_(values[first : first + len(view), None] if axis == 0 else values)
            return
        index = torch.arange(self.start, self.stop)
        block.mul_(values[index // math.prod(self.shape[axis + 1 :]) % self.shape[axis]])

    @property
    def number(self) -> float | None:
        """The coefficient, if it is one number."""
        return self.coefficient.values.item() if self.coefficient.axis is None else None

    @property
    def least(self) -> float:
        """The smallest of the coefficient's values, NaN-free."""
        return float(self.coefficient.values.min()) if self.coefficient.values.numel() else 1.0


class Trim:
    """TIES' trim of one term: the threshold, and how many that equal it are still to be kept as blocks pass."""

    def __init__(self, threshold: Threshold) -> None:
        self.value, self.ties = threshold.value, threshold.ties

    def apply(self, delta: Float[Tensor, " n"], work: Workspace) -> None:
        """Zero what is not kept, in place."""
        if self.value == 0:  # everything is kept: entries that equal 0 are 0 either way
            return
        if self.ties:
            equal = work.mask("equal", delta.numel()).numpy()
            magnitudes = torch.abs(delta, out=work.buffer("magnitudes", delta.numel())).numpy()
            np.equal(magnitudes, np.float32(self.value), out=equal)
            count = int(np.count_nonzero(equal))
            if count <= self.ties:
                self.ties -= count
                below = float(np.nextafter(np.float32(self.value), np.float32(0)))
                torch.hardshrink(delta, below, out=delta)
                return
            places = torch.from_numpy(np.flatnonzero(equal)[: self.ties])
            kept = delta[places]
            torch.hardshrink(delta, self.value, out=delta)
            delta[places] = kept
            self.ties = 0
            return
        torch.hardshrink(delta, self.value, out=delta)


def find_trims(job: Job, work: Workspace, see: "See | None" = None) -> list[Trim | None]:
    """The thresholds of a tensor's terms: one pass over base and terms together, seldom a second.

    None stands for a term of which all is kept, or nothing.

    Args:
        job: of any method; only TIES has thresholds.
        work: the calling thread's.
        see: shows one block to every search that is on, as :func:`see_block` does it.
    """
    found: list[Trim | None] = [None] * len(job.terms)
    if not job.needs_whole:
        return found
    assert job.base is not None
    see, numel = see or see_block, math.prod(job.output.shape)
    wanted: dict[int, int] = {}
    for i, term in enumerate(job.terms):
        keep = kept_count(term.density, numel)
        if not 0 < keep < numel:
            continue
        if numel <= SAMPLE:
            magnitudes = _magnitudes(term, work, work.floats("base", *job.base, 0, numel), 0, numel)
            found[i] = Trim(threshold_of(magnitudes, keep))
            continue
        wanted[i] = keep
    samples = _samples(job, work, numel, list(wanted)) if wanted else {}
    searches = {i: Selector(keep, samples[i], numel) for i, keep in wanted.items()}
    while searches:
        for start, stop in blocks(job.output.shape):
            see(job, work, searches, start, stop)
        for i, search in list(searches.items()):
            if (threshold := search.end_pass()) is not None:
                found[i] = Trim(threshold)
                del searches[i]
    return found


See = Callable[[Job, Workspace, Mapping[int, Selector], int, int], None]


def see_block(job: Job, work: Workspace, searches: Mapping[int, Selector], start: int, stop: int) -> None:
    """Show elements ``start`` to ``stop`` of the terms' deltas to their searches, by the number of the term."""
    assert job.base is not None
    base = work.floats("base", *job.base, start, stop)
    scratch = work.mask("equal", stop - start).numpy()
    spare = work.buffer("spare", stop - start, torch.int32).numpy().view(np.uint32)
    for i, search in searches.items():
        search.see(_magnitudes(job.terms[i], work, base, start, stop), scratch, spare)


def _magnitudes(term: Term, work: Workspace, base: Float[Tensor, " n"], start: int, stop: int) -> Magnitudes:
    delta = work.floats("magnitudes", term.checkpoint, term.tensor, start, stop)
    found: Magnitudes = delta.sub_(base).abs_().numpy()
    return found


def _samples(job: Job, work: Workspace, numel: int, wanted: Sequence[int]) -> dict[int, Magnitudes]:
    """Magnitudes from short runs spread over the tensor at uneven distances, so that no column is favoured."""
    assert job.base is not None and numel > SAMPLE >= _RUN
    runs = SAMPLE // _RUN
    parts: dict[int, list[Magnitudes]] = {i: [] for i in wanted}
    for number in range(runs):
        start = int((number + number * 0.6180339887 % 1) / runs * (numel - _RUN))
        base = work.floats("base", *job.base, start, start + _RUN)
        for i, found in parts.items():
            found.append(_magnitudes(job.terms[i], work, base, start, start + _RUN).copy())
    return {i: np.concatenate(found) for i, found in parts.items()}


def _drop(delta: Float[Tensor, " n"], term: Term, work: Workspace, start: int, *, rescale: bool) -> None:
    """DARE's drop, in place."""
    n = delta.numel()
    mask = work.mask("equal", n)
    state, spare = (work.buffer(slot, n, torch.int32).numpy().view(np.uint32) for slot in ("state", "spare"))
    fill_random_mask(mask.numpy(), state, spare, term.density, seed=term.seed, start=start)
    delta.mul_(work.buffer("magnitudes", n).copy_(mask))  # not filled: what is not finite must be seen
    if rescale and term.density > 0:
        delta.div_(term.density)


def _elect(
    weighted: Sequence[Float[Tensor, " n"]],
    coefficients: Sequence[_Factor],
    total: Float[Tensor, " n"],
    work: Workspace,
    *,
    normalize: bool,
) -> None:
    """TIES' elect and disjoint sum of weighted deltas into ``total``; the deltas are used up.

    Multiplying by the elected sign makes the entries that agree with it positive, and a clamp removes the others.
    """
    n = total.numel()
    sign, weight = work.buffer("sign", n), work.buffer("weight", n)
    total.copy_(weighted[0])
    for delta in weighted[1:]:
        total.add_(delta)
    sign.fill_(1.0)
    torch.copysign(sign, total, out=sign)
    for i, (delta, coefficient) in enumerate(zip(weighted, coefficients, strict=True)):
        delta.mul_(sign).clamp_(min=0)  # keeps NaN
        total.add_(delta) if i else total.copy_(delta)
        if normalize:
            delta.sign_()  # 1 where it agrees, else 0: products with it are exact
            if coefficient.number is not None and i:
                weight.add_(delta, alpha=coefficient.number)
                continue
            coefficient.multiply(delta)
            weight.add_(delta) if i else weight.copy_(delta)
    total.mul_(sign)
    if normalize:
        least = min(coefficient.least for coefficient in coefficients)
        if least > 0:
            weight.clamp_(min=least)  # 0 where none agrees, and then the total is 0 as well
        else:
            weight.masked_fill_(torch.eq(weight, 0, out=work.mask("equal", n)), 1.0)
        total.div_(weight)


def _parity(job: Job, work: Workspace, start: int, stop: int, dtype: torch.dtype) -> Shaped[Tensor, " n"]:
    """mergekit 0.1.5's task arithmetic (GeneralizedTaskArithmeticMerge.merge_group), step by step, in its dtype."""
    assert job.base is not None
    base = work.stored(*job.base, start, stop).to(dtype, copy=True)
    if not job.terms:
        return base
    deltas = torch.stack(
        [work.stored(term.checkpoint, term.tensor, start, stop).to(dtype) - base for term in job.terms]
    )
    weights = torch.tensor(job.weights, dtype=dtype)[:, None]
    mixed = deltas.mul_(weights).sum(dim=0)
    if job.normalize:
        divisor = weights.sum(dim=0)
        divisor[divisor.abs() < 1e-8] = 1
        mixed /= divisor
    if job.scale != 1:
        mixed *= job.scale
    return base + mixed


def _explain_not_finite(job: Job, merged: Tensor, start: int, stop: int) -> None:
    """Name the input that is not finite; a sum that merely overflows is no fault."""
    if torch.isfinite(merged).all():
        return
    sources = [(term.checkpoint, term.tensor) for term in job.terms]
    for checkpoint, name in [job.base, *sources] if job.base else sources:
        check_finite(checkpoint.load_elements(name, start, stop), where=checkpoint.where(name), start=start)
    raise RecipeError(
        f"merged tensor {job.output.name} overflows {str(job.output.dtype).removeprefix('torch.')}",
        mend="choose a wider output dtype, or smaller coefficients",
    )
