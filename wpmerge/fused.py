"""Merges of bfloat16 into bfloat16 without torch: what :mod:`wpmerge.blocks` computes, in one pass.

Large ones by compiled loops (:mod:`wpmerge.kernels`), small ones of task arithmetic in NumPy
(:mod:`wpmerge.array_kernels`): importing torch takes longer than half a billion weights.

:class:`FusedMerge` makes the same bits as :class:`~wpmerge.blocks.TensorMerge`, for the jobs that :func:`can_fuse`
names. Anything that is not finite is left to the latter, which knows how to say whose fault it is, and is imported only
then.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from wpmerge import array_kernels
from wpmerge.array_kernels import LARGEST_BFLOAT16
from wpmerge.checkpoint import Checkpoint
from wpmerge.checksum import KEYS, odd_numbers
from wpmerge.dtypes import Dtype
from wpmerge.jobs import Job
from wpmerge.selection import Magnitudes, Selector
from wpmerge.shards import Place
from wpmerge.trims import find_trims
from wpmerge.workspace import Workspace

if TYPE_CHECKING:
    from wpmerge.blocks import TensorMerge

logger = logging.getLogger(__name__)

_EVERYTHING = 0, 0x7FFFFFFF  # the bits of a bracket that holds every magnitude, NaN as well
WORTH_COMPILING = 2**29  # weights of experts from which on the loops save more time than it takes to load them


class Kernels(Protocol):
    """What is used of :mod:`wpmerge.kernels`; :mod:`wpmerge.array_kernels` has the first function alone."""

    TILE: int

    def write_add_weighted(self, *arguments: object) -> int: ...
    def write_elect(self, *arguments: object) -> int: ...
    def read_look(self, *arguments: object) -> bool: ...


def can_fuse(job: Job) -> bool:
    """Whether this job can be made without torch: task arithmetic or TIES, all of it bfloat16 in safetensors files."""
    if job.base is None or not job.terms or job.parity is not None or job.method not in ("task_arithmetic", "ties"):
        return False
    sources = [job.base, *((term.checkpoint, term.tensor) for term in job.terms)]
    if any(type(checkpoint) is not Checkpoint for checkpoint, _ in sources):
        return False  # a view of another checkpoint: an adapter's, or one of another vocabulary
    infos = [checkpoint.tensors[name] for checkpoint, name in sources]
    dtypes = {job.output.dtype, *(info.dtype for info in infos)}
    return dtypes == {Dtype.BF16} and all(info.descriptor >= 0 for info in infos)


def load_kernels(jobs: Sequence[Job]) -> Kernels | None:
    """The compiled loops, where some jobs can use them and are large enough to pay for loading them.

    Else those in NumPy, where they serve for the whole merge. None: torch makes it all.
    """
    usable = [job for job in jobs if can_fuse(job)]
    if sum(math.prod(job.output.shape) * len(job.terms) for job in usable) >= WORTH_COMPILING:
        try:
            from wpmerge import kernels
        except ImportError as error:
            logger.warning("numba cannot be used, so this merge takes longer: %s", error)
            return None
        kernels.prepare(ties=any(job.method == "ties" for job in usable))
        return kernels
    if len(usable) < len(jobs) or any(job.method == "ties" for job in usable):
        return None
    return cast("Kernels", array_kernels)


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
        tiles = workspace.array("tiles", len(sources) * kernels.TILE, np.uint16)
        self._tiles: NDArray[np.uint16] = tiles.reshape(len(sources), kernels.TILE)
        self._coefficients = _flat_coefficients(job)
        self._trims = find_trims(job, self._look, self._see)

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
        out = work.array("merged", self._kernels.TILE, np.uint16)
        total = np.zeros(1, np.uint64)
        inputs = self._descriptors, self._offsets, self._tiles, start, stop, *self._coefficients, np.float32(job.scale)
        output = place.descriptor, place.offset, out, KEYS, odd_numbers(2 * stop), total
        if job.method == "ties":
            worst = self._kernels.write_elect(*inputs, *output, *self._state(), job.normalize)
        else:
            worst = self._kernels.write_add_weighted(*inputs, *output)
        return int(total[0]) if worst <= LARGEST_BFLOAT16 else None

    @property
    def plain(self) -> TensorMerge:
        """The same job by the reference."""
        from wpmerge.blocks import TensorMerge

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

    def _look(self, terms: Sequence[int], start: int, stop: int) -> Iterable[Magnitudes]:
        """|term - base| of some terms; all of a tensor that is small, or a sample."""
        lows, highs = (np.full(len(terms), bits, np.uint32) for bits in _EVERYTHING)
        found = self._read_look(terms, start, stop, lows, highs, np.ones(len(terms), np.bool_))
        if found is None:
            from wpmerge.blocks import magnitudes_of

            return magnitudes_of(self._job, self._workspace, terms, start, stop)
        return iter(found[2])

    def _see(self, searches: Mapping[int, Selector], start: int, stop: int) -> None:
        """Show a block to the searches for thresholds."""
        lows, highs = np.array([search.bracket for search in searches.values()], np.uint32).T.copy()
        collect = np.array([search.collects for search in searches.values()])
        found = self._read_look(list(searches), start, stop, lows, highs, collect)
        if found is None:
            from wpmerge.blocks import see_block

            see_block(self._job, self._workspace, searches, start, stop)
            return
        for search, over, inside, kept, wanted in zip(searches.values(), *found, collect, strict=True):
            search.take(int(over), int(inside), kept[:inside].copy() if wanted else None)

    def _read_look(
        self,
        terms: Sequence[int],
        start: int,
        stop: int,
        lows: NDArray[np.uint32],
        highs: NDArray[np.uint32],
        collect: NDArray[np.bool_],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]] | None:
        """What is above a bracket and inside it, and the latter's magnitudes; None where it could not be read."""
        n, rows = stop - start, [0, *(1 + i for i in terms)]
        over, inside = np.zeros((2, len(terms)), np.int64)
        kept = self._workspace.array("kept", len(terms) * n, np.float32).reshape(len(terms), n)
        inputs = self._descriptors[rows], self._offsets[rows], self._tiles, start, n
        read = self._kernels.read_look(*inputs, lows, highs, collect, over, inside, kept.view(np.uint32))
        return (over, inside, kept) if read else None


def _flat_coefficients(
    job: Job,
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """All coefficients one after the other; per term where its own begin, their number, and how long each holds."""
    values = [term.coefficient.values.reshape(-1) for term in job.terms]
    sizes = np.array([len(own) for own in values], np.int64)
    axes = [term.coefficient.axis for term in job.terms]
    inner = [1 if axis is None else math.prod(job.output.shape[axis + 1 :]) for axis in axes]
    return np.concatenate(values), np.cumsum(sizes) - sizes, sizes, np.array(inner, np.int64)
