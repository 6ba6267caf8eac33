"""The files of a checkpoint directory: where it lies, what its configuration says, which file holds which tensor."""

import json
import re
from pathlib import Path
from typing import Any

from wpmerge.errors import CheckpointError
from wpmerge.tensorfile import TensorFile, TensorInfo, open_tensor_file

# What a hub id downloads: weights are asked for apart, since a repository may hold them in both formats.
_HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*"]
_HUB_SAFETENSORS = ["model*.safetensors", "adapter_model.safetensors"]
_HUB_PICKLES = ["pytorch_model*.bin", "adapter_model.bin"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
# Buffers that transformers computes itself; old checkpoints store them, new ones do not, and no expert trains them.
_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.(bias|masked_bias)|attention\.(bias|masked_bias))$")


def is_hub_id(source: str) -> bool:
    """Whether a text has the form of a hub id, ``owner/name`` with an optional ``@revision``."""
    return bool(_HUB_ID.fullmatch(source))


def locate(source: str) -> Path:
    """The local directory of a checkpoint; a hub id is downloaded to the hub's cache, or found there.

    Raises:
        CheckpointError: there is neither such a directory nor such a repository, or nobody may look.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return path
        there = path.exists()
    except OSError as error:
        raise CheckpointError("a checkpoint cannot be looked at", where=source, got=error.strerror) from None
    if there or not is_hub_id(source):
        raise CheckpointError("there is no such checkpoint directory", where=source, expected="a directory or a hub id")
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    try:
        for weights in (_HUB_SAFETENSORS, _HUB_PICKLES):
            wanted = [*_HUB_FILES, *weights]
            snapshot = snapshot_download(
                name, revision=revision or None, allow_patterns=wanted, ignore_patterns=["*/*"]
            )
            if any(found for pattern in weights for found in Path(snapshot).glob(pattern)):
                break
    except (OSError, ValueError) as error:  # not found, gated, offline, malformed id: all derive from these
        raise CheckpointError(
            "a checkpoint is neither a directory here nor obtainable from the hub",
            where=source,
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            mend="check the spelling; offline (HF_HUB_OFFLINE=1) only models already in the cache can be used",
        ) from None
    return Path(snapshot)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("a JSON file cannot be read", where=path, got=error) from None
    if not isinstance(found, dict):
        raise CheckpointError("a JSON file holds something else than an object", where=path, got=type(found).__name__)
    return found


def read_config(path: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """``config.json`` of a checkpoint directory.

    Raises:
        CheckpointError: missing or malformed, quantised weights, or code to be run that was not allowed.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError("a checkpoint directory has no config.json", where=path)
    config = read_json(path / "config.json")
    for name in ("config.json", "tokenizer_config.json"):
        if not trust_remote_code and (path / name).is_file() and read_json(path / name).get("auto_map"):
            raise CheckpointError(
                "a checkpoint asks to run code of its own",
                where=path / name,
                got="auto_map",
                mend="read that code, then pass --trust-remote-code if you want it run",
            )
    if config.get("quantization_config"):
        raise CheckpointError(
            "quantised checkpoints cannot be merged or scored",
            where=path / "config.json",
            got=config["quantization_config"].get("quant_method", "quantization_config"),
            mend="use the checkpoint it was quantised from",
        )
    return config


def read_tensors(path: Path) -> tuple[dict[Path, TensorFile], dict[str, TensorInfo]]:
    """The weights files of a directory, by transformers' file names, and the tensors in them without buffers.

    Raises:
        CheckpointError: no weights, two sets of them, a missing or damaged file, an index that does not fit.
    """
    for single, ending in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "pytorch_model*.bin")):
        index = path / f"{single}.index.json"
        if index.is_file() and (path / single).is_file():
            raise CheckpointError(
                "a checkpoint has both one weights file and an index of shards",
                where=path,
                got=f"{single} and {index.name}",
                mend="remove the one that is stale",
            )
        if index.is_file():
            return _read_shards(path, index)
        if (path / single).is_file():
            file = open_tensor_file(path / single)
            return {file.path: file}, {name: info for name, info in file.tensors.items() if not is_buffer(name)}
        strays = sorted(file.name for file in path.glob(ending))
        if strays:
            raise CheckpointError("weights files without an index", where=path, got=strays[0], expected=index.name)
    raise CheckpointError("a checkpoint directory holds no weights", where=path, expected="model.safetensors")


def is_buffer(name: str) -> bool:
    """Whether a tensor is a constant that models compute themselves: never merged, never written."""
    return bool(_BUFFERS.search(name))


def _read_shards(path: Path, index: Path) -> tuple[dict[Path, TensorFile], dict[str, TensorInfo]]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(shard, str) for shard in mapping.values()):
        raise CheckpointError("an index has no weight_map of names to files", where=index)
    files: dict[Path, TensorFile] = {}
    for shard in sorted(set(mapping.values())):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError("an index points outside its directory", where=index, got=shard)
        if not (path / shard).is_file():
            raise CheckpointError("a shard is missing", where=path / shard, mend="download the checkpoint again")
        files[path / shard] = open_tensor_file(path / shard)
    for name, shard in mapping.items():
        if name not in files[path / shard].tensors:
            raise CheckpointError(f"the index says that {shard} holds {name}, which it does not", where=index)
    tensors = {}
    for file in files.values():
        for name, info in file.tensors.items():
            if mapping.get(name, file.path.name) != file.path.name or name in tensors:
                raise CheckpointError(f"tensor {name} lies in two shards", where=file.path)
            if is_buffer(name):
                continue
            if name not in mapping:
                raise CheckpointError(f"shard {file.path.name} holds {name}, which the index leaves out", where=index)
            tensors[name] = info
    return files, tensors


def tokenizer_differences(base: Path, expert: Path, *, extended: bool = False) -> list[str]:
    """How the tokenizers in two directories differ, a sentence each.

    With ``extended`` the expert's may have more tokens, and more merges after the base's.

    A directory without tokenizer files (an adapter's, often) is taken to share the other's.
    """
    for file in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        ours, theirs = base / file, expert / file
        if not ours.is_file() or not theirs.is_file():
            continue
        if ours.read_bytes() == theirs.read_bytes():
            return []
        if file == "tokenizer.model":
            return [f"{file} differs from the base's"]
        tokenizers = [read_json(path) for path in (ours, theirs)]
        mine, other = (_token_ids(tokenizer, path) for tokenizer, path in zip(tokenizers, (ours, theirs), strict=True))
        found = [
            f"{file}: token {token!r} has id {other.get(token)}, in the base {mine.get(token)}"
            for token in sorted(mine if extended else {*mine, *other})
            if mine.get(token) != other.get(token)
        ]
        ours_, theirs_ = (_merges(tokenizer) for tokenizer in tokenizers)
        if ours_ != (theirs_[: len(ours_)] if extended else theirs_):
            found.append(f"{file}: the merges differ")
        return found
    return []


def _token_ids(tokenizer: dict[str, Any], path: Path) -> dict[str, int]:
    """Token -> id of a ``tokenizer.json`` (or of a bare ``vocab.json``), added tokens included."""
    if not isinstance(tokenizer.get("model"), dict):
        return tokenizer
    try:
        vocabulary = tokenizer["model"].get("vocab") or {}
        if isinstance(vocabulary, list):  # unigram models list (token, log-probability)
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        return dict(vocabulary) | {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or []}
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise CheckpointError("a tokenizer is malformed", where=path, got=f"{type(error).__name__}: {error}") from None


def _merges(tokenizer: dict[str, Any]) -> list[str]:
    """Byte-pair merges; older files write each pair as one string, newer ones as a list of two."""
    model = tokenizer.get("model")
    merges = (model.get("merges") if isinstance(model, dict) else None) or []
    if not isinstance(merges, list):
        return [str(merges)]
    return [" ".join(map(str, pair)) if isinstance(pair, list) else str(pair) for pair in merges]
