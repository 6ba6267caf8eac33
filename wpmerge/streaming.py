"""The engine of a merge: read a block of every input, combine in float32, round once, write it at its place.

A block is a few rows, about 2^18 elements: it stays in the processor's cache from reading to writing, so that a merge
costs little more than the reading and writing, and memory does not grow with the model. Threads share out runs of
blocks, or whole tensors where an operator needs a statistic of one; the bounds of a block depend on the tensor's shape
alone, so the result does not depend on them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Shaped

from wpmerge.checksum import Checksum
from wpmerge.dtypes import Dtype
from wpmerge.errors import CheckpointError
from wpmerge.fused import FusedMerge, Kernels, can_fuse, load_kernels
from wpmerge.jobs import Job, blocks
from wpmerge.shards import Shard, ShardWriter
from wpmerge.tensorfile import SafetensorsFile
from wpmerge.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS_PER_PIECE = 8  # a piece is what a thread takes at a time

Progress = Callable[[int, int], None]


def merge_jobs(
    jobs: Sequence[Job],
    shards: Sequence[Shard],
    directory: Path,
    *,
    threads: int = 1,
    sync: bool = True,
    allow_nan: bool = False,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Make every output tensor and write the shards into a directory.

    Shards that are already there whole, from an earlier run of the same work, are not made again.

    Args:
        jobs: one for each tensor of the shards.
        shards: the layout.
        directory: exists.
        threads: blocks worked on at the same time; the result is the same for any number.
        sync: bring each shard to disk before it takes its name.
        allow_nan: let values pass that are not finite.
        progress: called with bytes of output done and in all, in the calling thread.

    Returns:
        The checksum of each tensor's bytes, by name.

    Raises:
        CheckpointError: a weight that is not finite, a file that changed.
        RecipeError: a result that overflows the output dtype.
    """
    kernels = None if allow_nan else load_kernels(jobs)
    plain = kernels is None or not all(map(can_fuse, jobs))  # else torch is not loaded
    by_name = {job.output.name: job for job in jobs}
    total, done = sum(tensor.nbytes for shard in shards for tensor in shard.tensors), 0
    checksums: dict[str, str] = {}
    pieces: list[_Piece] = []
    writers = []
    for shard in shards:
        path = directory / shard.name
        if path.is_file() and path.stat().st_size == shard.nbytes:
            checksums |= _stored_checksums(path)
            done += sum(tensor.nbytes for tensor in shard.tensors)
            continue
        writer = _LazyWriter(directory, shard, sync=sync)
        writers.append(writer)
        made = [piece for tensor in shard.tensors for piece in _pieces(by_name[tensor.name], writer)]
        pieces += [*made, _Piece(job=None, writer=writer, bounds=())]
    workspaces = threading.local()

    def write(piece: _Piece) -> int:
        if not hasattr(workspaces, "one"):
            workspaces.one = Workspace()
        return _write_piece(piece, workspaces.one, kernels, allow_nan=allow_nan)

    try:
        with _one_thread_per_operation() if plain else contextlib.nullcontext(), _mapping(threads, plain) as map_:
            for piece, nbytes in zip(pieces, map_(write, pieces), strict=True):
                if piece.job is None:
                    checksums |= piece.writer.close()
                done += nbytes
                if progress and nbytes:
                    progress(done, total)
    except BaseException:  # the threads have ended: no file is closed under one that writes
        for writer in writers:
            writer.abandon()
        raise
    return checksums


def merge_tensor(job: Job, *, allow_nan: bool = False) -> Shaped[Tensor, "..."]:
    """One output tensor in memory, bit for bit as :func:`merge_jobs` writes it."""
    import torch

    out = torch.empty(job.output.shape, dtype=job.output.dtype.torch)
    for start, stop, block in merge_stream(job, allow_nan=allow_nan):
        out.view(-1)[start:stop] = block
    return out


def merge_stream(job: Job, *, allow_nan: bool = False) -> Iterator[tuple[int, int, Tensor]]:
    """The blocks of one output tensor in order, each valid until the next is asked for."""
    from wpmerge.blocks import TensorMerge

    made = TensorMerge(job, Workspace(), allow_nan=allow_nan)
    for start, stop in blocks(job.output.shape):
        yield start, stop, made.block(start, stop)


class _LazyWriter:
    """A shard's writer and checksums. The file is made when its first block is there, by whichever thread has it."""

    def __init__(self, directory: Path, shard: Shard, *, sync: bool) -> None:
        self._directory, self._shard, self._sync = directory, shard, sync
        self._lock = threading.Lock()
        self._writer: ShardWriter | None = None
        self._closed = False
        self._checksums = {tensor.name: Checksum() for tensor in shard.tensors}

    def write(self, name: str, start: int, block: Shaped[Tensor, " n"]) -> None:
        self._open().write(name, start, block)
        self._checksums[name].add(start * block.dtype.itemsize, block)

    def write_fused(self, made: FusedMerge, name: str, start: int, stop: int) -> bool:
        """Let compiled loops write a stretch of a tensor; whether they could."""
        part = made.write(start, stop, self._open().place(name))
        if part is None:
            return False
        self._checksums[name].add_part(part)
        return True

    def close(self) -> dict[str, str]:
        """Give the file its name; the checksums of its tensors."""
        self._open().close()
        self._closed = True
        return {name: made.text() for name, made in self._checksums.items()}

    def abandon(self) -> None:
        with self._lock:
            if self._writer is not None and not self._closed:
                self._writer.abandon()
            self._closed = True

    def _open(self) -> ShardWriter:
        with self._lock:
            if self._writer is None:
                self._writer = ShardWriter(self._directory, self._shard, sync=self._sync)
            return self._writer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Blocks of one tensor for one thread; without a job the end of a shard."""

    job: Job | None
    writer: _LazyWriter
    bounds: tuple[tuple[int, int], ...]


def _pieces(job: Job, writer: _LazyWriter) -> Iterator[_Piece]:
    bounds = tuple(blocks(job.output.shape))
    length = len(bounds) if job.needs_whole else BLOCKS_PER_PIECE
    for i in range(0, len(bounds), max(1, length)):
        yield _Piece(job=job, writer=writer, bounds=bounds[i : i + length])


def _write_piece(piece: _Piece, workspace: Workspace, kernels: Kernels | None, *, allow_nan: bool) -> int:
    if piece.job is None:
        return 0
    job, name = piece.job, piece.job.output.name
    first, last = piece.bounds[0][0], piece.bounds[-1][1]
    nbytes = (last - first) * job.output.dtype.itemsize
    if kernels is not None and can_fuse(job):
        fused = FusedMerge(job, workspace, kernels)
        if piece.writer.write_fused(fused, name, first, last):
            return nbytes
        made = fused.plain
    else:
        from wpmerge.blocks import TensorMerge

        made = TensorMerge(job, workspace, allow_nan=allow_nan)
    for start, stop in piece.bounds:
        piece.writer.write(name, start, made.block(start, stop))
    return nbytes


def _stored_checksums(path: Path) -> dict[str, str]:
    """The checksums of a shard that an earlier run finished."""
    file = SafetensorsFile(path)
    return {name: checksum_of(file, name) for name in file.tensors}


def checksum_of(file: SafetensorsFile, name: str) -> str:
    """The checksum of a tensor in a file."""
    info, made = file.tensors[name], Checksum()
    for start, stop in blocks((info.numel,)):
        made.add_bytes(start * info.dtype.itemsize, file.read_bytes(name, start, stop))
    return made.text()


@contextlib.contextmanager
def _mapping(threads: int, plain: bool) -> Iterator[Callable[..., Iterator[int]]]:
    """``map`` in order over some threads, the calling thread alone where there is one; ``plain``: torch is used."""
    if threads == 1:
        yield map
        return
    with ThreadPoolExecutor(threads, initializer=_use_one_thread if plain else None) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@contextlib.contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """Operations on blocks this small only lose by being shared out; blocks are shared out instead."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def job_dtype(stored: Dtype, wanted: Dtype | None) -> Dtype:
    """The dtype an output tensor is stored in: the wanted one, but integers and booleans stay what they are.

    Raises:
        CheckpointError: the wanted dtype is no floating-point type.
    """
    if wanted is not None and not wanted.is_floating_point:
        raise CheckpointError("weights cannot be stored in this dtype", got=wanted, expected="a floating-point dtype")
    return stored if wanted is None or not stored.is_floating_point else wanted
