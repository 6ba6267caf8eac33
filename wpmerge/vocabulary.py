"""Experts whose vocabulary is larger than the base's: cut them to its rows, or give every model the largest's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from jaxtyping import Shaped

from wpmerge.checkpoint import EMBEDDINGS, HEADS, Checkpoint
from wpmerge.directory import tokenizer_differences
from wpmerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Vocabulary = Literal["base", "largest"]


class _Resized(Checkpoint):
    """A checkpoint whose embedding and head have another number of rows; rows it lacks are another checkpoint's."""

    def __init__(self, inner: Checkpoint, shapes: Mapping[str, tuple[int, ...]], donor: Checkpoint) -> None:
        tensors = {
            name: info if name not in shapes else replace(info, shape=shapes[name], nbytes=0)
            for name, info in inner.tensors.items()
        }
        for name, info in tensors.items():
            tensors[name] = replace(info, nbytes=info.numel * info.dtype.itemsize)
        config = dict(inner.config)
        if "vocab_size" in donor.config:
            config["vocab_size"] = donor.config["vocab_size"]
        if "vocab_size" in (text := donor.config.get("text_config") or {}):
            config["text_config"] = {**(config.get("text_config") or {}), "vocab_size": text["vocab_size"]}
        super().__init__(
            source=inner.source, path=inner.path, config=config, files={}, tensors=tensors, tied=inner.tied
        )
        self.adapter = inner.adapter
        self.tokenizer_path = donor.tokenizer_path
        self._inner, self._donor = inner, donor

    def content_hash(self, *, full: bool = False) -> str:
        return self._inner.content_hash(full=full)

    def load_into(self, name: str, start: int, out: Shaped[Tensor, " n"]) -> None:
        info, stop = self._info(name), start + out.numel()
        if not 0 <= start <= stop <= info.numel:
            raise IndexError(f"{name} has {info.numel} elements, not {start} to {stop}")
        own = min(max(0, self._inner.tensors[name].numel - start), out.numel())
        if own:
            self._inner.load_into(name, start, out[:own])
        if own < out.numel():
            out[own:] = self._donor.load_elements(name, start + own, stop)


def match_vocabulary(
    checkpoints: Mapping[str, Checkpoint], base: str, vocabulary: Vocabulary | None
) -> dict[str, Checkpoint]:
    """Views of the checkpoints with one vocabulary.

    Args:
        checkpoints: by name.
        base: the base's name among them.
        vocabulary: ``base`` cuts every expert to the base's rows. ``largest`` gives every model the rows of the
            largest: rows that a model lacks are the largest's, so that a row which only one expert has is that
            expert's, whatever its coefficient. None: as they are.

    Raises:
        CheckpointError: a tokenizer that does not extend the smaller one: its rows mean other tokens.
    """
    if vocabulary is None:
        return dict(checkpoints)
    rows = {name: _rows(model) for name, model in checkpoints.items()}
    target = base if vocabulary == "base" else max(checkpoints, key=lambda name: (rows[name], name == base))
    chosen, made = checkpoints[target], {}
    for name, model in checkpoints.items():
        small, large = (chosen, model) if vocabulary == "base" else (model, chosen)
        if rows[name] < rows[target] and vocabulary == "base":
            raise CheckpointError(
                f"{name} has a smaller vocabulary than the base",
                where=model.path,
                got=rows[name],
                expected=rows[target],
            )
        if differences := tokenizer_differences(small.tokenizer_path, large.tokenizer_path, extended=True):
            raise CheckpointError(
                f"the vocabulary of {large.source} does not extend that of {small.source}",
                where=large.path,
                got=differences[0],
                mend="merge models whose common tokens have the same ids",
            )
        made[name] = _resize(name, model, chosen, rows[name], rows[target])
    if any(made[name] is not model for name, model in checkpoints.items()):
        logger.warning("the merge has %d rows and the tokenizer of %s", rows[target], chosen.source)
    return made


def _resize(name: str, model: Checkpoint, chosen: Checkpoint, rows: int, wanted: int) -> Checkpoint:
    if rows == wanted and not tokenizer_differences(model.tokenizer_path, chosen.tokenizer_path):
        return model
    shapes = {tensor: (wanted, *info.shape[1:]) for tensor, info in model.tensors.items() if _has_vocabulary(tensor)}
    if rows > wanted:
        logger.warning("%s: rows %d to %d of embedding and head are left out", name, wanted, rows - 1)
    elif rows < wanted:
        logger.warning("%s: rows %d to %d of embedding and head are those of %s", name, rows, wanted - 1, chosen.source)
    return _Resized(model, shapes, chosen)


def _rows(model: Checkpoint) -> int:
    return max((info.shape[0] for name, info in model.tensors.items() if _has_vocabulary(name)), default=0)


def _has_vocabulary(name: str) -> bool:
    return name.endswith((*HEADS, *EMBEDDINGS))
