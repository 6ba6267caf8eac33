"""The engine of a merge: read a block of every input, combine in float32, round once, write it at its place.

A block is a few rows, about 2^18 elements: it stays in the processor's cache from reading to writing, so that a merge
costs little more than the reading and writing, and memory does not grow with the model. Threads share out blocks; the
bounds of a block depend on the tensor's shape alone, so the result does not depend on them.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from wpmerge import operators
from wpmerge.checkpoint import Checkpoint
from wpmerge.errors import CheckpointError, RecipeError
from wpmerge.plan import Coefficient
from wpmerge.shards import OutputTensor, Shard, ShardWriter
from wpmerge.tensorfile import check_finite

BLOCK_ELEMENTS = 2**18
BLOCKS_PER_PIECE = 8  # a piece is what a thread takes at a time

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One input of an output tensor and what it is multiplied by."""

    checkpoint: Checkpoint
    tensor: str
    coefficient: Coefficient


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """How one output tensor is made.

    With a base: base + Σ coefficient · (term - base), its copy where there are no terms. Without: Σ coefficient · term.
    """

    output: OutputTensor
    base: tuple[Checkpoint, str] | None
    terms: tuple[Term, ...]


def merge_jobs(
    jobs: Sequence[Job],
    shards: Sequence[Shard],
    directory: Path,
    *,
    threads: int = 1,
    sync: bool = True,
    progress: Progress | None = None,
) -> None:
    """Make every output tensor and write the shards into a directory.

    Shards that are already there whole, from an earlier run of the same work, are not made again.

    Args:
        jobs: one for each tensor of the shards.
        shards: the layout.
        directory: exists.
        threads: blocks worked on at the same time; the result is the same for any number.
        sync: bring each shard to disk before it takes its name.
        progress: called with bytes of output done and in all, in the calling thread.

    Raises:
        CheckpointError: a weight that is not finite, a file that changed.
        RecipeError: a result that overflows the output dtype.
    """
    by_name = {job.output.name: job for job in jobs}
    total, done = sum(tensor.nbytes for shard in shards for tensor in shard.tensors), 0
    with (
        _one_thread_per_operation(),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        for shard in shards:
            path = directory / shard.name
            if path.is_file() and path.stat().st_size == shard.nbytes:
                done += sum(tensor.nbytes for tensor in shard.tensors)
                continue
            writer = ShardWriter(directory, shard, sync=sync)
            pieces = [piece for tensor in shard.tensors for piece in _pieces(by_name[tensor.name], writer)]
            try:
                for nbytes in map(_write_piece, pieces) if threads == 1 else pool.map(_write_piece, pieces):
                    done += nbytes
                    if progress:
                        progress(done, total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                writer.abandon()
                raise
            writer.close()


def merge_tensor(job: Job) -> Shaped[Tensor, "..."]:
    """One output tensor in memory, bit for bit as :func:`merge_jobs` writes it."""
    parts = [merge_block(job, start, stop) for start, stop in blocks(job.output.shape)]
    return torch.cat(parts).view(job.output.shape) if parts else torch.empty(job.output.shape, dtype=job.output.dtype)


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Element ranges that cut a tensor into whole rows, or rows into parts where one row is longer than a block."""
    numel = math.prod(shape)
    if numel == 0:
        return
    columns = numel // shape[0] if shape else 1
    step = max(1, BLOCK_ELEMENTS // columns) * columns if columns <= BLOCK_ELEMENTS else BLOCK_ELEMENTS
    for start in range(0, numel, step):
        yield start, min(start + step, numel)


def merge_block(job: Job, start: int, stop: int) -> Shaped[Tensor, " n"]:
    """Elements ``start`` to ``stop`` of an output tensor, in its output dtype.

    Raises:
        CheckpointError: an input is not finite there.
        RecipeError: the result is not, though the inputs are: it overflows the output dtype.
    """
    dtype = job.output.dtype
    base = job.base[0].load_elements(job.base[1], start, stop) if job.base else None
    combined = base if base is not None and not job.terms else _combine(job, base, start, stop)
    merged = combined.to(dtype)
    # A value that is not finite in any input, even times 0, makes the result so: one check serves them all.
    if dtype.is_floating_point and not math.isfinite(float(merged.sum(dtype=torch.float32))):
        _explain_not_finite(job, merged, start, stop)
    return merged


def _combine(job: Job, base: Tensor | None, start: int, stop: int) -> Float[Tensor, " n"]:
    shape = job.output.shape
    terms = [term.checkpoint.load_elements(term.tensor, start, stop).to(torch.float32) for term in job.terms]
    view, coefficients = _coefficients(job.terms, shape, start, stop)
    models = [term.view(view) for term in terms]
    if base is None:
        return operators.linear(models, coefficients).reshape(-1)
    return operators.task_arithmetic(base.to(torch.float32).view(view), models, coefficients).reshape(-1)


def _coefficients(
    terms: Sequence[Term], shape: tuple[int, ...], start: int, stop: int
) -> tuple[tuple[int, ...], list[Tensor]]:
    """A view of the block in which every coefficient broadcasts, and the coefficients for it."""
    if all(term.coefficient.axis is None for term in terms):
        return (stop - start,), [term.coefficient.values for term in terms]
    columns = math.prod(shape[1:])
    if len(shape) == 2 and start % columns == 0 and stop % columns == 0:
        rows = slice(start // columns, stop // columns)
        found = []
        for term in terms:
            values = term.coefficient.values
            found.append(values[rows, None] if term.coefficient.axis == 0 else values)  # a row vector or a scalar
        return ((stop - start) // columns, columns), found
    index = torch.arange(start, stop)
    found = []
    for term in terms:
        axis = term.coefficient.axis
        if axis is None:
            found.append(term.coefficient.values)
        else:
            found.append(term.coefficient.values[index // math.prod(shape[axis + 1 :]) % shape[axis]])
    return (stop - start,), found


def _explain_not_finite(job: Job, merged: Tensor, start: int, stop: int) -> None:
    """Name the input that is not finite; a sum that merely overflows float32 is no fault."""
    if torch.isfinite(merged).all():
        return
    sources = [(term.checkpoint, term.tensor) for term in job.terms]
    for checkpoint, name in [job.base, *sources] if job.base else sources:
        check_finite(checkpoint.load_elements(name, start, stop), where=checkpoint.where(name), start=start)
    raise RecipeError(
        f"merged tensor {job.output.name} overflows {str(job.output.dtype).removeprefix('torch.')}",
        mend="choose a wider output dtype, or smaller coefficients",
    )


def _pieces(job: Job, writer: ShardWriter) -> Iterator[tuple[Job, ShardWriter, list[tuple[int, int]]]]:
    bounds = list(blocks(job.output.shape))
    for i in range(0, len(bounds), BLOCKS_PER_PIECE):
        yield job, writer, bounds[i : i + BLOCKS_PER_PIECE]


def _write_piece(piece: tuple[Job, ShardWriter, list[tuple[int, int]]]) -> int:
    job, writer, bounds = piece
    for start, stop in bounds:
        writer.write(job.output.name, start, merge_block(job, start, stop))
    return (bounds[-1][1] - bounds[0][0]) * job.output.dtype.itemsize


@contextlib.contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """Operations on blocks this small only lose by being shared out; blocks are shared out instead."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def job_dtype(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype an output tensor is stored in: the wanted one, but integers and booleans stay what they are.

    Raises:
        CheckpointError: the wanted dtype is no floating-point type.
    """
    if wanted is not None and not wanted.is_floating_point:
        raise CheckpointError("weights cannot be stored in this dtype", got=wanted, expected="a floating-point dtype")
    return stored if wanted is None or not stored.is_floating_point else wanted
