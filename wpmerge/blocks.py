"""One block of one output tensor: read it from every input, combine in float32, round once. Allocates nothing.

The formulas are those of :mod:`wpmerge.operators`, written in place on a thread's buffers; tests hold the two equal to
the bit. Each product and each sum is rounded on its own (no fused multiply-add): the bits are then mergekit's, and do
not depend on where a processor's vectors end.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from wpmerge.dtypes import Dtype
from wpmerge.errors import RecipeError
from wpmerge.jobs import DROPPED, ELECTED, TRIMMED, Factor, Job, Term
from wpmerge.operators import fill_random_mask
from wpmerge.selection import Magnitudes, Selector
from wpmerge.tensorfile import check_finite
from wpmerge.trims import Trim, find_trims
from wpmerge.workspace import Workspace


class TensorMerge:
    """The making of one output tensor, block by block.

    Args:
        job: what to make.
        workspace: the calling thread's.
        allow_nan: let values pass that are not finite.
        trims: what :func:`trims_of` gives, where it is known already.
    """

    def __init__(
        self, job: Job, workspace: Workspace, *, allow_nan: bool = False, trims: Sequence[Trim | None] | None = None
    ) -> None:
        self._job, self._workspace, self._allow_nan = job, workspace, allow_nan
        self._trims = trims_of(job, workspace) if trims is None else trims

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
            merged = _parity(job, work, start, stop, job.parity.torch).to(dtype.torch)
        else:
            combined = self._combine(start, stop)
            merged = work.buffer("merged", stop - start, dtype).copy_(combined) if dtype is not Dtype.F32 else combined
            # Finite squares make every value finite in any of the dtypes but float16; a value that is not finite in
            # any input, even times 0, makes the result so. One pass serves all these checks.
            squares = float(torch.dot(combined, combined))
            if squares < (math.inf if dtype is not Dtype.F16 else 2.0**31):
                return merged
        if not self._allow_nan and not math.isfinite(float(merged.sum(dtype=torch.float64))):
            _explain_not_finite(job, merged, start, stop)
        return merged

    def _combine(self, start: int, stop: int) -> Float[Tensor, " n"]:
        job, work = self._job, self._workspace
        base = work.floats("base", *job.base, start, stop) if job.base else None
        if base is not None and not job.terms:
            return base
        coefficients = [_BlockFactor(term.coefficient, job.output.shape, start, stop) for term in job.terms]
        total = work.buffer("total", stop - start)
        weighted = []
        for i, (term, coefficient, trim) in enumerate(zip(job.terms, coefficients, self._trims, strict=True)):
            elected = job.method in ELECTED
            slot: object = ("term", i) if elected else "term" if i else "total"
            delta = work.floats(slot, term.checkpoint, term.tensor, start, stop)
            if base is not None:
                delta.sub_(base)
            if trim is not None:
                _trim(delta, trim, work)
            elif job.method in TRIMMED and term.density <= 0:
                delta.mul_(0.0)  # not filled: what is not finite must be seen
            elif job.method in DROPPED and term.density < 1:
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


class _BlockFactor:
    """A coefficient over one block, and how to multiply the block by it."""

    def __init__(self, factor: Factor, shape: tuple[int, ...], start: int, stop: int) -> None:
        self._values, self._axis = torch.from_numpy(factor.values), factor.axis
        self._shape, self._start, self._stop = shape, start, stop

    def multiply(self, block: Float[Tensor, " n"]) -> None:
        """``block`` times the coefficient, in place."""
        axis, shape, start, stop = self._axis, self._shape, self._start, self._stop
        if axis is None:
            number = self._values.item()
            if number != 1:
                block.mul_(number)
            return
        columns = math.prod(shape[1:])
        if len(shape) == 2 and columns and start % columns == 0 and stop % columns == 0:
            view = block.view(-1, columns)
            first = start // columns
            view.mul_(self._values[first : first + len(view), None] if axis == 0 else self._values)
            return
        index = torch.arange(start, stop)
        block.mul_(self._values[index // math.prod(shape[axis + 1 :]) % shape[axis]])

    @property
    def number(self) -> float | None:
        """The coefficient, if it is one number."""
        return self._values.item() if self._axis is None else None

    @property
    def least(self) -> float:
        """The smallest of the coefficient's values, NaN-free."""
        return float(self._values.min()) if self._values.numel() else 1.0


def _trim(delta: Float[Tensor, " n"], trim: Trim, work: Workspace) -> None:
    """Zero what is not kept, in place, and count down the ties that were."""
    if trim.value == 0:  # everything is kept: entries that equal 0 are 0 either way
        return
    if trim.ties:
        equal = work.mask("equal", delta.numel()).numpy()
        magnitudes = torch.abs(delta, out=work.buffer("magnitudes", delta.numel())).numpy()
        np.equal(magnitudes, np.float32(trim.value), out=equal)
        count = int(np.count_nonzero(equal))
        if count <= trim.ties:
            trim.ties -= count
            below = float(np.nextafter(np.float32(trim.value), np.float32(0)))
            torch.hardshrink(delta, below, out=delta)
            return
        places = torch.from_numpy(np.flatnonzero(equal)[: trim.ties])
        kept = delta[places]
        torch.hardshrink(delta, trim.value, out=delta)
        delta[places] = kept
        trim.ties = 0
        return
    torch.hardshrink(delta, trim.value, out=delta)


def trims_of(job: Job, work: Workspace) -> list[Trim | None]:
    """The trims of a job's terms, found in plain tensor operations."""
    return find_trims(job, partial(magnitudes_of, job, work), partial(see_block, job, work))


def see_block(job: Job, work: Workspace, searches: Mapping[int, Selector], start: int, stop: int) -> None:
    """Show elements ``start`` to ``stop`` of the terms' deltas to their searches, by the number of the term."""
    scratch = work.mask("equal", stop - start).numpy()
    spare = work.buffer("spare", stop - start, Dtype.I32).numpy().view(np.uint32)
    found = magnitudes_of(job, work, list(searches), start, stop)
    for search, magnitudes in zip(searches.values(), found, strict=True):
        search.see(magnitudes, scratch, spare)


def magnitudes_of(job: Job, work: Workspace, terms: Sequence[int], start: int, stop: int) -> Iterator[Magnitudes]:
    """|term - base| of some terms, by number; each valid until the next."""
    assert job.base is not None
    base = work.floats("base", *job.base, start, stop)
    for i in terms:
        delta = work.floats("magnitudes", job.terms[i].checkpoint, job.terms[i].tensor, start, stop)
        found: Magnitudes = delta.sub_(base).abs_().numpy()
        yield found


def _drop(delta: Float[Tensor, " n"], term: Term, work: Workspace, start: int, *, rescale: bool) -> None:
    """DARE's drop, in place."""
    n = delta.numel()
    mask = work.mask("equal", n)
    state, spare = (work.buffer(slot, n, Dtype.I32).numpy().view(np.uint32) for slot in ("state", "spare"))
    fill_random_mask(mask.numpy(), state, spare, term.density, seed=term.seed, start=start)
    delta.mul_(work.buffer("magnitudes", n).copy_(mask))  # not filled: what is not finite must be seen
    if rescale and term.density > 0:
        delta.div_(term.density)


def _elect(
    weighted: Sequence[Float[Tensor, " n"]],
    coefficients: Sequence[_BlockFactor],
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
        f"merged tensor {job.output.name} overflows {job.output.dtype}",
        mend="choose a wider output dtype, or smaller coefficients",
    )
