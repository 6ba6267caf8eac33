"""Files that hold tensors: safetensors, and PyTorch's legacy pickles. Reads by position, trusts nothing it is told.

A safetensors file is 8 bytes of header length N (little endian), N bytes of JSON, then the tensors' bytes. The JSON
names each tensor's dtype, shape and byte range. Every one of these is checked against the others and against the size
of the file before a single weight is read.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import weakref
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from wpmerge.dtypes import Dtype
from wpmerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 32 * 2**20  # a few hundred thousand tensors; the format allows 100 MB, which only an attack fills
FETCH_AGAIN = "copy or download the file again"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies.

    ``offset`` is the absolute byte offset of its first element in ``file``; -1 where the file is memory-mapped or the
    values are computed (legacy pickles, low-rank adapters). ``nbytes`` counts the bytes of its elements in ``dtype``.
    ``descriptor`` is the file as :class:`SafetensorsFile` holds it open, -1 elsewhere.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    file: Path
    offset: int
    nbytes: int
    descriptor: int = field(default=-1, repr=False, compare=False)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@runtime_checkable
class TensorFile(Protocol):
    """One file of tensors, readable by name and element range."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a tensor in row-major order, in the stored dtype."""
        ...

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out``, flat and of the stored dtype, with elements from ``start`` on."""
        ...

    def read_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of elements ``start`` to ``stop`` as they are stored."""
        ...


class SafetensorsFile:
    """A safetensors file, its header checked, its tensors read by position.

    Raises:
        CheckpointError: the header or the file's size contradicts itself; names file and tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError("cannot open a weights file", where=path, got=error.strerror) from None
        weakref.finalize(self, os.close, self._descriptor)
        header, data_start, data_bytes = self._read_header()
        infos = _check_header(path, header, data_start, data_bytes)
        self.tensors: Mapping[str, TensorInfo] = {
            name: replace(info, descriptor=self._descriptor) for name, info in infos.items()
        }

    def _read_header(self) -> tuple[dict[str, Any], int, int]:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                "a weights file ends inside its header",
                where=self.path,
                got=f"{size} bytes",
                expected=f"at least {8 + length if size >= 8 else 8} bytes",
                mend=FETCH_AGAIN,
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                "a weights file has a header too large to be one",
                where=self.path,
                got=f"{length} bytes",
                expected=f"at most {MAX_HEADER_BYTES} bytes",
            )
        raw = bytearray(length)
        _read_exactly(self._descriptor, memoryview(raw), 8, self.path)
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise CheckpointError("a weights file has a malformed header", where=self.path, got=error) from None
        if not isinstance(header, dict):
            raise CheckpointError("a weights file has a malformed header", where=self.path, expected="a JSON object")
        return header, 8 + length, size - 8 - length

    def read(self, name: str, start: int, stop: int) -> Shaped[Tensor, " n"]:
        """Elements ``start`` to ``stop`` of a tensor in row-major order, in the stored dtype."""
        import torch

        out = torch.empty(stop - start, dtype=self.tensors[name].dtype.torch)
        self.read_into(name, start, out)
        return out

    def read_into(self, name: str, start: int, out: Shaped[Tensor, " n"]) -> None:
        """Fill ``out``, flat and of the stored dtype, with elements from ``start`` on."""
        import torch

        if out.numel():
            self._fill(name, start, out.view(torch.uint8).numpy())

    def read_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of elements ``start`` to ``stop`` as they are stored."""
        out = np.empty((stop - start) * self.tensors[name].dtype.itemsize, np.uint8)
        self._fill(name, start, out)
        return out

    def _fill(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        info = self.tensors[name]
        _read_exactly(self._descriptor, out.data, info.offset + start * info.dtype.itemsize, self.path)


class PickleFile:
    """A legacy ``pytorch_model*.bin``: memory-mapped, and loaded without executing anything it contains.

    Raises:
        CheckpointError: the file is not such a file, or its pickle asks for more than tensors.
    """

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                "a legacy weights file was refused; nothing in it was executed",
                where=path,
                got=str(error).splitlines()[0] if str(error) else type(error).__name__,
                mend="use the checkpoint's safetensors files, or convert it with transformers' save_pretrained",
            ) from None
        if not isinstance(loaded, dict):
            raise CheckpointError("a legacy weights file holds no tensors by name", where=path, got=type(loaded))
        loaded = loaded.get("state_dict", loaded)
        self._loaded: dict[str, Tensor] = {}
        infos: dict[str, TensorInfo] = {}
        for name, tensor in loaded.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                raise CheckpointError("a legacy weights file holds something else than tensors", where=path, got=name)
            dtype = Dtype.of(tensor.dtype)
            if dtype is None:
                raise CheckpointError(f"tensor {name} has an unsupported dtype", where=path, got=tensor.dtype)
            self._loaded[name], nbytes = tensor, tensor.numel() * dtype.itemsize
            infos[name] = TensorInfo(
                name=name, shape=tuple(tensor.shape), dtype=dtype, file=path, offset=-1, nbytes=nbytes
            )
        self.tensors: Mapping[str, TensorInfo] = infos

    def read(self, name: str, start: int, stop: int) -> Shaped[Tensor, " n"]:
        """Elements ``start`` to ``stop`` of a tensor in row-major order, in the stored dtype."""
        return self._loaded[name].detach().reshape(-1)[start:stop].clone()

    def read_into(self, name: str, start: int, out: Shaped[Tensor, " n"]) -> None:
        """Fill ``out``, flat and of the stored dtype, with elements from ``start`` on."""
        out.copy_(self._loaded[name].detach().reshape(-1)[start : start + out.numel()])

    def read_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of elements ``start`` to ``stop`` as they are stored."""
        return bytes_of(self.read(name, start, stop))


def bytes_of(tensor: Shaped[Tensor, " n"]) -> NDArray[np.uint8]:
    """The bytes of a flat tensor, which they share memory with where it is contiguous."""
    import torch

    found: NDArray[np.uint8] = tensor.contiguous().view(torch.uint8).numpy()
    return found


def open_tensor_file(path: Path) -> TensorFile:
    """Open a weights file by its ending: ``.safetensors``, or ``.bin`` for a legacy pickle."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def check_finite(tensor: Shaped[Tensor, "..."], *, where: object, start: int = 0) -> None:
    """Refuse NaN and infinity.

    Args:
        tensor: a block of weights, any dtype.
        where: tensor and file, for the message.
        start: flat index of the block's first element in its tensor, for the message.

    Raises:
        CheckpointError: with the number of bad values and the first of them.
    """
    import torch

    if not tensor.dtype.is_floating_point or math.isfinite(float(tensor.sum(dtype=torch.float32))):
        return  # a sum is finite only if every term is; it is one pass, without a mask in memory
    flat = tensor.reshape(-1)
    bad = torch.nonzero(~torch.isfinite(flat)).reshape(-1)
    if bad.numel():
        first = int(bad[0])
        raise CheckpointError(
            "weights that are not finite",
            where=where,
            got=f"{bad.numel()} such value(s), the first, {float(flat[first])}, at flat index {start + first}",
            expected="finite numbers",
            mend="this checkpoint is broken; use another copy of it",
        )


def _read_exactly(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill ``view`` from ``offset`` on; a short read means that the file shrank under us."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError("a weights file became shorter while it was read", where=path, mend=FETCH_AGAIN)
        done += count


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} occurs twice")
    return found


def _check_header(path: Path, header: dict[str, Any], data_start: int, data_bytes: int) -> dict[str, TensorInfo]:
    """Check every entry of a header and that the byte ranges tile the data without gap or overlap."""
    header.pop("__metadata__", None)
    infos = {name: _check_entry(path, name, entry, data_start, data_bytes) for name, entry in header.items()}
    end = data_start
    for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            raise CheckpointError(
                f"tensor {info.name} {'overlaps another' if info.offset < end else 'follows a gap'} in its file",
                where=path,
                got=f"first byte {info.offset - data_start}",
                expected=f"first byte {end - data_start}",
                mend=FETCH_AGAIN,
            )
        end = info.offset + info.nbytes
    if end != data_start + data_bytes:
        raise CheckpointError(
            "a weights file holds bytes that belong to no tensor",
            where=path,
            got=f"{data_bytes} bytes of data",
            expected=f"{end - data_start} bytes",
            mend=FETCH_AGAIN,
        )
    return infos


def _check_entry(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> TensorInfo:
    fields = entry if isinstance(entry, dict) else {}
    if not name.isprintable():  # half a surrogate pair among them, which no file can hold
        raise CheckpointError("a weights file has a malformed header", where=path, got=f"the name {name!r}")
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise CheckpointError(f"tensor {name} has a malformed header entry", where=path, got=str(entry)[:200])
    if not isinstance(dtype, str) or dtype not in Dtype.__members__:
        expected = f"one of {', '.join(Dtype.__members__)}"
        raise CheckpointError(f"tensor {name} has an unsupported dtype", where=path, got=dtype, expected=expected)
    nbytes = math.prod(shape) * Dtype[dtype].itemsize
    if nbytes != span[1] - span[0]:
        raise CheckpointError(
            f"tensor {name} has a header entry that contradicts itself",
            where=path,
            got=f"{span[1] - span[0]} bytes",
            expected=f"{nbytes} bytes for shape {shape} of {dtype}",
        )
    if span[1] > data_bytes:
        raise CheckpointError(
            f"the file ends before tensor {name} does",
            where=path,
            got=f"{data_start + data_bytes} bytes",
            expected=f"at least {data_start + span[1]} bytes",
            mend=FETCH_AGAIN,
        )
    return TensorInfo(
        name=name, shape=tuple(shape), dtype=Dtype[dtype], file=path, offset=data_start + span[0], nbytes=nbytes
    )


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of non-negative integers (``true`` is an int to Python, not to us)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
