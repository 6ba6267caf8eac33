"""Buffers that a thread uses again for every block: fresh memory would cost more than the arithmetic done in it."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from wpmerge.checkpoint import Checkpoint


class Workspace:
    """The buffers of one thread, by purpose. What a method returns is valid until it is asked for again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, torch.dtype], Tensor] = {}

    def buffer(self, slot: object, n: int, dtype: torch.dtype = torch.float32) -> Shaped[Tensor, " n"]:
        """A flat buffer with undefined contents; another slot is another buffer."""
        found = self._buffers.get((slot, dtype))
        if found is None or found.numel() < n:
            found = self._buffers[slot, dtype] = torch.empty(n, dtype=dtype)
        return found[:n]

    def mask(self, slot: object, n: int) -> Bool[Tensor, " n"]:
        """A flat boolean buffer with undefined contents."""
        return self.buffer(slot, n, torch.bool)

    def stored(self, checkpoint: Checkpoint, name: str, start: int, stop: int) -> Shaped[Tensor, " n"]:
        """Elements of a tensor in its stored dtype."""
        out = self.buffer("stored", stop - start, checkpoint.tensors[name].dtype)
        checkpoint.load_into(name, start, out)
        return out

    def floats(self, slot: object, checkpoint: Checkpoint, name: str, start: int, stop: int) -> Float[Tensor, " n"]:
        """Elements of a tensor in float32."""
        out = self.buffer(slot, stop - start)
        if checkpoint.tensors[name].dtype is torch.float32:
            checkpoint.load_into(name, start, out)
        else:
            out.copy_(self.stored(checkpoint, name, start, stop))
        return out
