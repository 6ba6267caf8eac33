"""What is known of a model before it is downloaded or opened: where it lies, how large it is, its configuration.

Nothing is fetched: a hub id is looked up in the hub's cache only.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from wpmerge.adapter import is_adapter
from wpmerge.directory import is_hub_id, read_config, read_json
from wpmerge.engine import empty_model
from wpmerge.errors import CheckpointError

SAMPLES, SAMPLE_BYTES = 64, 4096
_IDENTITY = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")
_WEIGHTS = (
    ("model.safetensors", "model*.safetensors"),
    ("pytorch_model.bin", "pytorch_model*.bin"),
    ("adapter_model.safetensors", "adapter_model.safetensors"),
    ("adapter_model.bin", "adapter_model.bin"),
)
_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model that takes part.

    Attributes:
        source: as the recipe names it.
        place: "here", a directory; "cache", whole in the hub's cache; "hub", to be downloaded.
        path: where it lies, or where what is known of it lies; None where nothing is.
        nbytes: of its weights; None where that is not known before it is downloaded.
        sized: how that is known: from its "files", its "index", or its "config".
        config: its ``config.json``; None where it is not at hand, and for an adapter.
        adapter: whether it is a LoRA adapter.
        complete: whether its weights are all there.
    """

    source: str
    place: Literal["here", "cache", "hub"]
    path: Path | None
    nbytes: int | None
    sized: Literal["files", "index", "config"] | None
    config: Mapping[str, Any] | None
    adapter: bool
    complete: bool


def find_source(source: str, *, trust_remote_code: bool = False) -> Source:
    """What is at hand of a checkpoint or adapter, without a network.

    Raises:
        CheckpointError: no such directory and no hub id; a configuration that cannot be used.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        place: Literal["here", "cache", "hub"] = "here"
    elif path.exists() or not is_hub_id(source):
        raise CheckpointError("there is no such checkpoint directory", where=source, expected="a directory or a hub id")
    else:
        cached = _cached(source)
        if cached is None:
            return Source(
                source=source,
                place="hub",
                path=None,
                nbytes=None,
                sized=None,
                config=None,
                adapter=False,
                complete=False,
            )
        path, place = cached, "cache"
    adapter = is_adapter(path)
    config = None if adapter else read_config(path, trust_remote_code=trust_remote_code)
    size, complete = _weight_files(path)
    sized: Literal["files", "index", "config"] | None = "files" if complete else None
    nbytes = size if complete else None
    if nbytes is None and (said := _said_by_index(path)) is not None:
        nbytes, sized = said, "index"
    if nbytes is None and config is not None:
        nbytes, sized = parameters(config) * itemsize(config), "config"
    if place == "cache" and not complete:
        place = "hub"
    return Source(
        source=source,
        place=place,
        path=path,
        nbytes=nbytes,
        sized=sized,
        config=config,
        adapter=adapter,
        complete=complete,
    )


def itemsize(config: Mapping[str, Any]) -> int:
    """Bytes of a stored weight, as a configuration says; float32 where it does not, as transformers takes it."""
    return _ITEMSIZE.get(str(config.get("dtype") or config.get("torch_dtype")), 4)


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a configuration's model, a tied head left out.

    Raises:
        CheckpointError: the configuration makes no model.
    """
    try:
        model = empty_model(config, device=torch.device("meta"))
    except Exception as error:  # transformers raises many kinds for values that contradict each other
        raise CheckpointError(
            "the configuration makes no model", where="config.json", got=str(error).splitlines()[-1].strip()
        ) from None
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def parameters(config: Mapping[str, Any]) -> int:
    """How many numbers a configuration's model holds."""
    return sum(math.prod(shape) for shape in shapes_of(config).values())


def identity(path: Path) -> str:
    """A directory's configuration, tokenizer and weights as a hash: small files whole, large ones by samples.

    The name of the directory and times of files do not count, so that a moved or copied checkpoint stays the same.
    """
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _IDENTITY for file in path.glob(pattern)}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            if size <= SAMPLES * SAMPLE_BYTES:
                digest.update(opened.read())
                continue
            for number in range(SAMPLES):
                opened.seek(number * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _cached(source: str) -> Path | None:
    """The snapshot of a hub id in the cache, if its configuration is there."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = source.partition("@")
    for file in ("config.json", "adapter_config.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=revision or None)
        except (OSError, ValueError):  # no id of a repository
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _weight_files(path: Path) -> tuple[int, bool]:
    """Bytes of a directory's weights, and whether they are all there."""
    for single, pattern in _WEIGHTS:
        index = path / f"{single}.index.json"
        if index.is_file():
            shards = sorted(set((read_json(index).get("weight_map") or {}).values()))
            there = [path / shard for shard in shards if (path / shard).is_file()]
            return sum(shard.stat().st_size for shard in there), bool(shards) and len(there) == len(shards)
        files = sorted(path.glob(pattern))
        if files:
            return sum(file.stat().st_size for file in files), True
    return 0, False


def _said_by_index(path: Path) -> int | None:
    """What an index says that all shards hold."""
    for single, _ in _WEIGHTS:
        index = path / f"{single}.index.json"
        if index.is_file():
            try:
                size = json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"]
            except (OSError, ValueError, KeyError, TypeError):
                return None
            return int(size) if isinstance(size, int | float) else None
    return None
