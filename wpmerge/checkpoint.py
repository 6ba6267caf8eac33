"""Read any checkpoint lazily: sharded or single safetensors, legacy pickles, LoRA adapters, hub ids.

Opening reads headers and configuration only; weights are read by position, block by block, so that memory does not
grow with the model. What a checkpoint says of itself is checked before it is believed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from wpmerge.adapter import Adapter, is_adapter, read_adapter
from wpmerge.directory import locate, read_config, read_tensors, tokenizer_differences
from wpmerge.dtypes import Dtype
from wpmerge.errors import CheckpointError
from wpmerge.tensorfile import TensorFile, TensorInfo, bytes_of, check_finite

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checkpoint", "TensorInfo", "check_finite", "check_same_family", "open_checkpoint"]

logger = logging.getLogger(__name__)

SAMPLE_BYTES = 4096
COMPARE_ELEMENTS = 2**20
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_TIED_BY_DEFAULT = frozenset({"gpt2", "gemma", "gemma2", "gemma3", "gemma3_text"})  # their classes' own default


class Checkpoint:
    """A model's weights and configuration, opened lazily.

    Attributes:
        source: as the user gave it.
        path: the directory it lies in; an adapter's own directory where it is one.
        tokenizer_path: the directory of its tokenizer.
        config: ``config.json``.
        tensors: where each tensor lies, sorted by name. A head tied to the embedding is not among them.
        tied: names stored twice, the left-out name -> the name in ``tensors``.
        adapter: whether this is a base with a LoRA adapter applied as it is read.
    """

    adapter = False

    def __init__(
        self,
        *,
        source: str,
        path: Path,
        config: dict[str, Any],
        files: Mapping[Path, TensorFile],
        tensors: Mapping[str, TensorInfo],
        tied: Mapping[str, str],
    ) -> None:
        self.source, self.path, self.config, self.tied = source, path, config, tied
        self.tokenizer_path = path
        self.tensors: Mapping[str, TensorInfo] = {name: tensors[name] for name in sorted(tensors)}
        self._files = files

    def load(self, name: str) -> Shaped[Tensor, "..."]:
        """A whole tensor in its stored dtype.

        Raises:
            CheckpointError: there is no such tensor, or its file cannot be read.
        """
        info = self._info(name)
        return self.load_elements(name, 0, info.numel).view(info.shape)

    def load_elements(self, name: str, start: int, stop: int) -> Shaped[Tensor, " n"]:
        """Elements ``start`` to ``stop`` (exclusive) of a tensor in row-major order, in its stored dtype.

        Raises:
            CheckpointError: there is no such tensor, or its file cannot be read.
        """
        import torch

        out = torch.empty(max(0, stop - start), dtype=self._info(name).dtype.torch)
        if stop < start:
            raise IndexError(f"{name} has no elements {start} to {stop}")
        self.load_into(name, start, out)
        return out

    def load_into(self, name: str, start: int, out: Shaped[Tensor, " n"]) -> None:
        """Fill a flat buffer of the tensor's stored dtype with its elements from ``start`` on.

        Raises:
            CheckpointError: there is no such tensor, or its file cannot be read.
        """
        info = self._info(name)
        if not 0 <= start <= start + out.numel() <= info.numel:
            raise IndexError(f"{name} has {info.numel} elements, not {start} to {start + out.numel()}")
        self._files[info.file].read_into(info.name, start, out)

    def stored_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of elements ``start`` to ``stop`` of a tensor in its stored dtype.

        Raises:
            CheckpointError: there is no such tensor, or its file cannot be read.
        """
        info = self._info(name)
        if (file := self._files.get(info.file)) is None:  # a view of another checkpoint: its elements are computed
            return bytes_of(self.load_elements(name, start, stop))
        return file.read_bytes(info.name, start, stop)

    def where(self, name: str) -> str:
        """A tensor and its file, for messages."""
        return f"{name} in {self.tensors[name].file}"

    def content_hash(self, *, full: bool = False) -> str:
        """A stable identity of the weights, whatever their sharding.

        Args:
            full: read every byte. Without it, names, dtypes, shapes and 4 KiB at the start, middle and end of each
                tensor are hashed: milliseconds, and enough to tell trained checkpoints apart, but blind to a change
                elsewhere in a tensor.

        Returns:
            ``sha256:…`` or ``sampled-sha256:…``.
        """
        digest = hashlib.sha256()
        for name, info in self.tensors.items():
            digest.update(f"{name} torch.{info.dtype} {info.shape}\n".encode())
            step = (COMPARE_ELEMENTS if full else SAMPLE_BYTES) // info.dtype.itemsize
            last = max(0, info.numel - step)
            starts = range(0, info.numel, step) if full else sorted({0, last // 2, last})
            for start in starts:
                digest.update(self.stored_bytes(name, start, min(start + step, info.numel)).data)
        return f"{'' if full else 'sampled-'}sha256:{digest.hexdigest()}"

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"there is no tensor {name}", where=self.path)
        return self.tensors[name]


class _AdaptedCheckpoint(Checkpoint):
    """A base with a LoRA adapter applied as its tensors are read; touched tensors are float32."""

    adapter = True

    def __init__(self, *, source: str, base: Checkpoint, adapter: Adapter) -> None:
        tensors = dict(base.tensors)
        for name, key in adapter.replaced.items():
            tensors[name] = adapter.file.tensors[key]
        for name in adapter.low_rank:
            info = base.tensors[name]
            tensors[name] = replace(info, dtype=Dtype.F32, file=adapter.file.path, offset=-1, nbytes=info.numel * 4)
        super().__init__(source=source, path=adapter.path, config=base.config, files={}, tensors=tensors, tied={})
        self.base = base
        self._terms = adapter

    def load_into(self, name: str, start: int, out: Shaped[Tensor, " n"]) -> None:
        info, stop = self._info(name), start + out.numel()
        if not 0 <= start <= stop <= info.numel:
            raise IndexError(f"{name} has {info.numel} elements, not {start} to {stop}")
        if name in self._terms.replaced:
            block = self._terms.file.read(self._terms.replaced[name], start, stop)
        else:
            block = self.base.load_elements(name, start, stop)
        if name in self._terms.low_rank and out.numel():
            block = self._terms.low_rank[name].block(start, stop).add_(block)
        out.copy_(block)


def open_checkpoint(
    source: str | Path, *, base: Checkpoint | None = None, trust_remote_code: bool = False
) -> Checkpoint:
    """Open a checkpoint for reading.

    Args:
        source: a local directory, or a hub id ``owner/name`` with an optional ``@revision``, which goes through
            huggingface_hub, its cache and its offline switch (``HF_HUB_OFFLINE``).
        base: what a LoRA adapter is applied to; needed for adapters, ignored otherwise.
        trust_remote_code: accept a configuration that names code to be downloaded and run.

    Raises:
        CheckpointError: nothing there, a damaged or contradictory file, an unsupported kind; names file and tensor.
    """
    path = locate(str(source))
    if is_adapter(path):
        if base is None:
            raise CheckpointError(
                "a LoRA adapter alone is no checkpoint", where=path, mend="give the base it was trained on as well"
            )
        return _AdaptedCheckpoint(source=str(source), base=base, adapter=read_adapter(path, base.tensors))
    config = read_config(path, trust_remote_code=trust_remote_code)
    files, tensors = read_tensors(path)
    if not tensors:
        raise CheckpointError("a checkpoint holds no tensors", where=path)
    whole = Checkpoint(source=str(source), path=path, config=config, files=files, tensors=tensors, tied={})
    tied = _find_tied(whole)
    kept = {name: info for name, info in tensors.items() if name not in tied}
    return Checkpoint(source=str(source), path=path, config=config, files=files, tensors=kept, tied=tied)


def _find_tied(whole: Checkpoint) -> dict[str, str]:
    """The head that is the embedding again, where the configuration ties them and both are stored."""
    heads = [name for name in whole.tensors if name.endswith(HEADS)]
    embeddings = [name for name in whole.tensors if name.endswith(EMBEDDINGS)]
    if not is_tied(whole.config) or len(heads) != 1 or len(embeddings) != 1:
        return {}
    head, embedding = whole.tensors[heads[0]], whole.tensors[embeddings[0]]
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    for start in range(0, head.numel, COMPARE_ELEMENTS):
        stop = min(start + COMPARE_ELEMENTS, head.numel)
        if not same:
            break
        pair = [whole.stored_bytes(info.name, start, stop) for info in (head, embedding)]
        same = np.array_equal(pair[0], pair[1])
    if not same:
        raise CheckpointError(
            f"{head.name} differs from {embedding.name}, but the configuration ties them",
            where=head.file,
            mend="set tie_word_embeddings in config.json to false, if they are meant to differ",
        )
    return {head.name: embedding.name}


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a configuration ties the output head to the embedding."""
    for level in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in level:
            return bool(level["tie_word_embeddings"])
    return config.get("model_type") in _TIED_BY_DEFAULT


# Configuration that decides what the weights mean and that no shape shows.
_MEANING = ("model_type", "architectures", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")
_POSITIONS = ("rope_theta", "rope_scaling", "rope_parameters", "sliding_window")


def check_same_family(base: Checkpoint, expert: Checkpoint, *, name: str) -> None:
    """Refuse an expert whose weights do not mean the same as the base's, tensor by tensor.

    Compared: architecture, attention heads, tensor names, shapes, vocabulary, tokenizer. Different position settings
    (``rope_*``) are warned of: merges over them are published, and the base's settings are kept.

    Args:
        base: the base.
        expert: another checkpoint, which must fit it.
        name: the expert's name, for messages.

    Raises:
        CheckpointError: names the first difference and counts them all.
    """
    differences = [
        f"config.json: {key} is {expert.config.get(key)}, the base has {base.config.get(key)}"
        for key in _MEANING
        if base.config.get(key) != expert.config.get(key)
    ]
    if is_tied(base.config) != is_tied(expert.config):
        differences.append(f"tie_word_embeddings is {is_tied(expert.config)}, the base has {is_tied(base.config)}")
    if (ours := _vocab_size(base.config)) != (theirs := _vocab_size(expert.config)):
        differences.append(f"the vocabulary has {theirs} entries, the base's {ours}")
    for tensor in sorted({*base.tensors, *expert.tensors}):
        if tensor not in expert.tensors:
            differences.append(f"tensor {tensor} is missing")
        elif tensor not in base.tensors:
            differences.append(f"tensor {tensor} is not in the base")
        elif (ours := base.tensors[tensor].shape) != (theirs := expert.tensors[tensor].shape):
            differences.append(f"tensor {tensor} has shape {theirs}, the base's {ours}")
    differences += tokenizer_differences(base.tokenizer_path, expert.tokenizer_path)
    if differences:
        more = f" ({len(differences)} differences in all)" if len(differences) > 1 else ""
        raise CheckpointError(
            f"expert {name} is not of the base's family",
            where=expert.path,
            got=differences[0] + more,
            expected=f"the architecture, tensors and tokenizer of {base.path}",
            mend="use the base that this expert was trained from",
        )
    for key in _POSITIONS:
        if base.config.get(key) != expert.config.get(key):
            ours, theirs = base.config.get(key), expert.config.get(key)
            logger.warning("expert %s has %s %s, the base %s: the base's is kept", name, key, theirs, ours)


def _vocab_size(config: Mapping[str, Any]) -> Any:
    return config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
