"""Large merges of bfloat16 into bfloat16 by compiled loops: what :mod:`wpmerge.blocks` computes, in one pass.

:class:`FusedMerge` makes the same bits as :class:`~wpmerge.blocks.TensorMerge`, for the jobs that :func:`can_fuse`
names. Anything that is not finite is left to the latter, which knows how to say whose fault it is.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from wpmerge.blocks import Job, TensorMerge, find_trims, see_block
from wpmerge.checkpoint import Checkpoint
from wpmerge.checksum import KEYS, odd_numbers
from wpmerge.selection import Selector
from wpmerge.shards import Place
from wpmerge.workspace import Workspace

logger = logging.getLogger(__name__)

WORTH_COMPILING = 2**29  # weights of experts from which on the loops save more time than it takes to load them


class Kernels(Protocol):
    """The functions of :mod:`wpmerge.kernels` that are used from outside it."""

    LARGEST_BFLOAT16: int
    TILE: int

    def write_add_weighted(self, *arguments: object) -> int: ...
    def write_elect(self, *arguments: object) -> int: ...
    def read_look(self, *arguments: object) -> bool: ...


def can_fuse(job: Job) -> bool:
    """Whether the compiled loops know this job: task arithmetic or TIES, all of it bfloat16 in safetensors files."""
    if job.base is None or not job.terms or job.parity is not None or job.method not in ("task_arithmetic", "ties"):
        return False
    sources = [job.base, *((term.checkpoint, term.tensor) for term in job.terms)]
    if any(type(checkpoint) is not Checkpoint for checkpoint, _ in sources):
        return False  # a view of another checkpoint: an adapter's, or one of another vocabulary
    infos = [checkpoint.tensors[name] for checkpoint, name in sources]
    dtypes = {job.output.dtype, *(info.dtype for info in infos)}
    return dtypes == {torch.bfloat16} and all(info.descriptor >= 0 for info in infos)


def load_kernels(jobs: Sequence[Job]) -> Kernels | None:
    """The compiled loops, where some jobs can use them and are large enough to pay for loading them."""
    usable = [job for job in jobs if can_fuse(job)]
    if sum(math.prod(job.output.shape) * len(job.terms) for job in usable) < WORTH_COMPILING:
        return None
    try:
        from wpmerge import kernels
    except ImportError as error:
        logger.warning("numba cannot be used, so this merge takes longer: %s", error)
        return None
    kernels.prepare(ties=any(job.method == "ties" for job in usable))
    return kernels


class FusedMerge:
    """The making of one output tensor as :class:`~wpmerge.blocks.TensorMerge` does it, into its place in a file.

    Args:
        job: one that :func:`can_fuse` accepts.
        workspace: the calling thread's.
        kernels: what :func:`load_kernels` gives.
    """

    def __init__(self, job: Job, workspace: Workspace, kernels: Kernels) -> None:
        assert job.base is not None
        self._job, self._workspace, self._kernels = job, workspace, kernels
        sources = [job.base, *((term.checkpoint, term.tensor) for term in job.terms)]
        infos = [checkpoint.tensors[name] for checkpoint, name in sources]
        self._descriptors = np.array([info.descriptor for info in infos], np.int32)
        self._offsets = np.array([info.offset for info in infos], np.int64)
        tiles = workspace.buffer("tiles", len(sources) * kernels.TILE, torch.bfloat16)
        self._tiles = tiles.view(torch.uint16).view(len(sources), kernels.TILE).numpy()
        self._coefficients = _flat_coefficients(job)
        self._trims = find_trims(job, workspace, self._see)

    def write(self, start: int, stop: int, place: Place) -> int | None:
        """Make elements ``start`` to ``stop`` and write them; a job that needs the whole tensor is made whole.

        Args:
            start: a multiple of 8.
            stop: where it is not the tensor's end, a multiple of 8.
            place: where the tensor begins.

        Returns:
            Their part of the tensor's checksum. None where something was not finite, or could not be read or written:
            :attr:`plain` says what, and makes them.
        """
        job, work = self._job, self._workspace
        out = work.buffer("merged", self._kernels.TILE, torch.bfloat16).view(torch.uint16).numpy()
        total = np.zeros(1, np.uint64)
        inputs = self._descriptors, self._offsets, self._tiles, start, stop, *self._coefficients, np.float32(job.scale)
        output = place.descriptor, place.offset, out, KEYS, odd_numbers(2 * stop), total
        if job.method == "ties":
            worst = self._kernels.write_elect(*inputs, *output, *self._state(), job.normalize)
        else:
            worst = self._kernels.write_add_weighted(*inputs, *output)
        return int(total[0]) if worst <= self._kernels.LARGEST_BFLOAT16 else None

    @property
    def plain(self) -> TensorMerge:
        """The same job by the reference."""
        return TensorMerge(self._job, self._workspace, trims=self._trims)

    def _state(self) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Each term's threshold as bits, and how many that equal it are still to be kept; -1 where nothing is."""
        thresholds, left = np.zeros(len(self._trims), np.float32), np.zeros(len(self._trims), np.int64)
        for k, (term, trim) in enumerate(zip(self._job.terms, self._trims, strict=True)):
            if trim is not None:
                thresholds[k], left[k] = trim.value, trim.ties
            elif term.density <= 0:
                left[k] = -1
        return thresholds.view(np.uint32), left

    def _see(self, job: Job, work: Workspace, searches: Mapping[int, Selector], start: int, stop: int) -> None:
        """Show a block to the searches for thresholds."""
        n, rows = stop - start, [0, *(1 + i for i in searches)]
        lows, highs = np.array([search.bracket for search in searches.values()], np.uint32).T.copy()
        collect = np.array([search.collects for search in searches.values()])
        over, inside = np.zeros((2, len(searches)), np.int64)
        kept = work.buffer("kept", len(searches) * n).view(len(searches), n).numpy()
        inputs = self._descriptors[rows], self._offsets[rows], self._tiles, start, n
        if not self._kernels.read_look(*inputs, lows, highs, collect, over, inside, kept.view(np.uint32)):
            see_block(job, work, searches, start, stop)
            return
        for k, search in enumerate(searches.values()):
            search.take(int(over[k]), int(inside[k]), kept[k, : inside[k]].copy() if collect[k] else None)


def _flat_coefficients(
    job: Job,
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """All coefficients one after the other; per term where its own begin, their number, and how long each holds."""
    values = [term.coefficient.values.reshape(-1).numpy() for term in job.terms]
    sizes = np.array([len(own) for own in values], np.int64)
    axes = [term.coefficient.axis for term in job.terms]
    inner = [1 if axis is None else math.prod(job.output.shape[axis + 1 :]) for axis in axes]
    return np.concatenate(values), np.cumsum(sizes) - sizes, sizes, np.array(inner, np.int64)
