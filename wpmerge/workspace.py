"""Buffers that a thread uses again for every block: fresh memory would cost more than the arithmetic done in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
from numpy.typing import NDArray

from wpmerge.checkpoint import Checkpoint
from wpmerge.dtypes import Dtype

if TYPE_CHECKING:
    from torch import Tensor


class Workspace:
    """The buffers of one thread, by purpose. What a method returns is valid until it is asked for again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, Dtype], Tensor] = {}
        self._arrays: dict[object, NDArray[Any]] = {}

    def array(self, slot: object, n: int, dtype: type[np.generic]) -> NDArray[Any]:
        """A flat array with undefined contents, for work without torch; a slot keeps to one dtype."""
        found = self._arrays.get(slot)
        if found is None or len(found) < n:
            found = self._arrays[slot] = np.empty(n, dtype)
        return found[:n]

    def buffer(self, slot: object, n: int, dtype: Dtype = Dtype.F32) -> Shaped[Tensor, " n"]:
        """A flat buffer with undefined contents; another slot is another buffer."""
        found = self._buffers.get((slot, dtype))
        if found is None or found.numel() < n:
            import torch

            found = self._buffers[slot, dtype] = torch.empty(n, dtype=dtype.torch)
        return found[:n]

    def mask(self, slot: object, n: int) -> Bool[Tensor, " n"]:
        """A flat boolean buffer with undefined contents."""
        return self.buffer(slot, n, Dtype.BOOL)

    def stored(self, checkpoint: Checkpoint, name: str, start: int, stop: int) -> Shaped[Tensor, " n"]:
        """Elements of a tensor in its stored dtype."""
        out = self.buffer("stored", stop - start, checkpoint.tensors[name].dtype)
        checkpoint.load_into(name, start, out)
        return out

    def floats(self, slot: object, checkpoint: Checkpoint, name: str, start: int, stop: int) -> Float[Tensor, " n"]:
        """Elements of a tensor in float32."""
        out = self.buffer(slot, stop - start)
        if checkpoint.tensors[name].dtype is Dtype.F32:
            checkpoint.load_into(name, start, out)
        else:
            out.copy_(self.stored(checkpoint, name, start, stop))
        return out
