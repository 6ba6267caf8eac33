"""Where a model's weights come from while it is run: memory, disk, or a mixture of other models' weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from wpmerge.arch import Kind, Layout, Slice
from wpmerge.checkpoint import Checkpoint, check_finite

Weights = dict[str, Tensor]
"""Name → tensor: relative to the layer for the weights of a layer, canonical for the rest."""


@runtime_checkable
class WeightSource(Protocol):
    """A model's weights, asked for one layer at a time."""

    def layer(self, index: int) -> Weights:
        """The weights of one decoder layer, names relative to it."""

    def outer(self, names: Sequence[str] | None = None) -> Weights:
        """The weights outside the layers, canonical names: those of ``names``, or all."""


class CheckpointWeights:
    """A checkpoint's weights in the compute dtype.

    Args:
        layout: names the tensors.
        checkpoint: holds them.
        device: where they go.
        dtype: what they are converted to.
        resident: keep what was read; otherwise read it anew at each call, so that memory holds one layer. Matrices
            outside the layers, which are a vocabulary high, then stay in the checkpoint's dtype.

    Raises:
        CheckpointError: while reading, for a tensor with NaN or Inf.
    """

    def __init__(
        self,
        layout: Layout,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        resident: bool = True,
    ) -> None:
        self._layout, self._checkpoint, self._device, self._dtype = layout, checkpoint, device, dtype
        self._kept: dict[int, Weights] | None = {} if resident else None

    def layer(self, index: int) -> Weights:
        """The weights of one decoder layer, names relative to it."""
        return self._read(index, self._layout.layer_tensors(index), self._layout.layer_prefix(index))

    def outer(self, names: Sequence[str] | None = None) -> Weights:
        """The weights outside the layers, canonical names: those of ``names``, or all."""
        if self._kept is not None or names is None:  # what is kept is read whole
            return self._read(-1, self._layout.outer_tensors(), "")
        return self._read(-1, names, "")

    def _read(self, key: int, names: Sequence[str], prefix: str) -> Weights:
        if self._kept is not None and key in self._kept:
            return self._kept[key]
        weights = {name.removeprefix(prefix): self._load(name, outer=key < 0) for name in names}
        if self._kept is not None:
            self._kept[key] = weights
        return weights

    def _load(self, name: str, *, outer: bool) -> Tensor:
        stored = self._layout.stored[name]
        tensor = self._checkpoint.load(stored)
        check_finite(tensor, where=f"{self._checkpoint.source}: {stored}")
        as_stored = self._kept is None and outer and tensor.ndim > 1
        return tensor.to(device=self._device, dtype=None if as_stored else self._dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedWeights:
    """A function of other sources' weights, applied where they are asked for: an interpolation, a merge, a graft.

    Attributes:
        layout: names the tensors.
        sources: the models that are mixed.
        mix: canonical name and the sources' tensors of that name, in ``dtype``, → the mixed tensor.
        dtype: what is mixed in: at least the sources' own, since a streamed vocabulary's matrix comes as it is stored.
    """

    layout: Layout
    sources: tuple[WeightSource, ...]
    mix: Callable[[str, tuple[Tensor, ...]], Tensor]
    dtype: torch.dtype = torch.float32

    def layer(self, index: int) -> Weights:
        """The weights of one decoder layer, names relative to it."""
        return self._mixed([source.layer(index) for source in self.sources], self.layout.layer_prefix(index))

    def outer(self, names: Sequence[str] | None = None) -> Weights:
        """The weights outside the layers, canonical names: those of ``names``, or all."""
        return self._mixed([source.outer(names) for source in self.sources], "")

    def _mixed(self, parts: Sequence[Weights], prefix: str) -> Weights:
        return {name: self.mix(prefix + name, tuple(self._wide(part[name]) for part in parts)) for name in parts[0]}

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, self.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class StateWeights:
    """A whole model's weights in memory.

    Attributes:
        layout: names the tensors.
        tensors: canonical name → weights.
    """

    layout: Layout
    tensors: Mapping[str, Tensor]

    def layer(self, index: int) -> Weights:
        """The weights of one decoder layer, names relative to it."""
        prefix = self.layout.layer_prefix(index)
        return {name.removeprefix(prefix): self.tensors[name] for name in self.layout.layer_tensors(index)}

    def outer(self, names: Sequence[str] | None = None) -> Weights:
        """The weights outside the layers, canonical names."""
        return {name: self.tensors[name] for name in self.layout.outer_tensors()}


def swap(
    pieces: Sequence[Slice], into: Mapping[str, Tensor], source: Mapping[str, Tensor], *, prefix: str = ""
) -> Weights:
    """``into`` with ``pieces`` taken from ``source``: weight patching itself (arXiv:2604.13694, section 3).

    Args:
        pieces: what is replaced, canonical names.
        into: the weights that are patched, as :class:`WeightSource` gives them; left unchanged.
        source: the weights the pieces come from, same names.
        prefix: what the canonical names have before the names of ``into``, :meth:`Layout.layer_prefix` for a layer.
    """
    patched = dict(into)
    copied: set[str] = set()
    for piece in pieces:
        name = piece.tensor.removeprefix(prefix)
        if piece.axis is None:
            patched[name] = source[name]
            continue
        if name not in copied:
            patched[name] = patched[name].clone()
            copied.add(name)
        span = piece.stop - piece.start
        patched[name].narrow(piece.axis, piece.start, span).copy_(source[name].narrow(piece.axis, piece.start, span))
    return patched


def differs(
    pieces: Sequence[Slice], one: Mapping[str, Tensor], other: Mapping[str, Tensor], *, prefix: str = ""
) -> bool:
    """Whether two models differ in any of ``pieces``; where they do not, a patch does nothing and need not be run."""

    def part(weights: Mapping[str, Tensor], piece: Slice) -> Tensor:
        tensor = weights[piece.tensor.removeprefix(prefix)]
        return tensor if piece.axis is None else tensor.narrow(piece.axis, piece.start, piece.stop - piece.start)

    return any(not torch.equal(part(one, piece), part(other, piece)) for piece in pieces)


def swap_kind(layout: Layout, kind: Kind, layer: int, into: Weights, source: Weights) -> Weights:
    """``into`` with every unit of one kind in one layer taken from ``source``."""
    prefix = layout.layer_prefix(layer)
    pieces = []
    for name in into:
        units = layout.tensors[prefix + name]
        kinds = {segment.kind for segment in units.segments}
        if kinds == {kind}:
            pieces.append(Slice(tensor=prefix + name, axis=None, start=0, stop=0))
        elif kind in kinds:
            own = [segment for segment in units.segments if segment.kind == kind]
            pieces += [Slice(tensor=prefix + name, axis=units.axis, start=s.start, stop=s.stop) for s in own]
    return swap(pieces, into, source, prefix=prefix)
