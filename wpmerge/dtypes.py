"""Number formats of stored weights. torch is imported only when asked for: that takes longer than a small merge."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import dtype as TorchDtype


class Dtype(Enum):
    """A format under safetensors' name, with torch's name and the bytes of an element."""

    F64 = "float64", 8
    F32 = "float32", 4
    F16 = "float16", 2
    BF16 = "bfloat16", 2
    I64 = "int64", 8
    I32 = "int32", 4
    I16 = "int16", 2
    I8 = "int8", 1
    U8 = "uint8", 1
    BOOL = "bool", 1

    def __init__(self, torch_name: str, itemsize: int) -> None:
        self.torch_name, self.itemsize = torch_name, itemsize

    def __str__(self) -> str:
        return self.torch_name

    @property
    def is_floating_point(self) -> bool:
        """Whether it holds fractions."""
        return "float" in self.torch_name

    @property
    def torch(self) -> TorchDtype:
        """The same as torch knows it."""
        import torch

        found: TorchDtype = getattr(torch, self.torch_name)
        return found

    @classmethod
    def of(cls, dtype: TorchDtype) -> Dtype | None:
        """torch's dtype as one of these; None where it is none."""
        return _BY_TORCH_NAME.get(str(dtype).removeprefix("torch."))


_BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in Dtype}
FLOATS = {dtype.torch_name: dtype for dtype in (Dtype.BF16, Dtype.F16, Dtype.F32)}
"""What checkpoints are written in, by torch's name, which recipes and options use."""
