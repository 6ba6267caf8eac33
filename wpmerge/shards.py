"""Lay out safetensors shards and write them by position, so that no tensor has to be held whole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Shaped

from wpmerge.dtypes import Dtype
from wpmerge.tensorfile import bytes_of

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """A tensor to be written: its name, shape and stored dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file: its header, ready to write, and the absolute byte offset of each of its tensors."""

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    offsets: Mapping[str, int]
    nbytes: int


def layout_shards(tensors: Sequence[OutputTensor], shard_bytes: int) -> list[Shard]:
    """Distribute tensors over files, in the order given, as transformers names them.

    Args:
        tensors: in the order wanted.
        shard_bytes: most bytes of weights per file; a larger tensor gets a file of its own.
    """
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return [_lay_out("model.safetensors", groups[0])]
    count = len(groups)
    return [_lay_out(f"model-{i:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups, start=1)]


def index_json(shards: Sequence[Shard]) -> str:
    """The index of a sharded checkpoint, as transformers reads it."""
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor lies in an open file: from byte ``offset`` on."""

    descriptor: int
    offset: int


class ShardWriter:
    """One shard being written. Blocks may come in any order and from several threads.

    The file has its final size from the start and its final name only after :meth:`close`.
    """

    def __init__(self, directory: Path, shard: Shard, *, sync: bool = True) -> None:
        self._shard, self._sync = shard, sync
        self._path = directory / shard.name
        self._partial = directory / f"{shard.name}.part"
        self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._dtypes = {tensor.name: tensor.dtype for tensor in shard.tensors}
        try:
            os.ftruncate(self._descriptor, shard.nbytes)
            write_all(self._descriptor, memoryview(shard.header), 0)
        except OSError:
            os.close(self._descriptor)
            raise

    def write(self, name: str, start: int, block: Shaped[Tensor, " n"]) -> None:
        """Write a flat block at element ``start`` of a tensor; its dtype is the tensor's."""
        dtype = self._dtypes[name]
        if block.dtype != dtype.torch:
            raise ValueError(f"{name} is stored as {dtype}, not {block.dtype}")
        offset = self._shard.offsets[name] + start * dtype.itemsize
        if block.numel():
            write_all(self._descriptor, bytes_of(block).data, offset)

    def place(self, name: str) -> Place:
        """Where a tensor is to be written, for who does it without :meth:`write`; valid until :meth:`close`."""
        return Place(descriptor=self._descriptor, offset=self._shard.offsets[name])

    def close(self) -> None:
        """Bring the shard to disk and give it its name."""
        try:
            if self._sync:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        self._partial.rename(self._path)

    def abandon(self) -> None:
        """Let go of the file without giving it its name."""
        os.close(self._descriptor)


def _lay_out(name: str, tensors: Sequence[OutputTensor]) -> Shard:
    """Wide dtypes come first, so that every tensor starts at a multiple of its own element size."""
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for tensor in ordered:
        starts[tensor.name] = end
        end += tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "data_offsets": [starts[tensor.name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    offsets = {key: len(header) + start for key, start in starts.items()}
    return Shard(name=name, header=header, tensors=tuple(ordered), offsets=offsets, nbytes=len(header) + end)


def write_all(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of some bytes from byte ``offset`` of an open file on."""
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
