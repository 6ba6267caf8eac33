"""A hub cache that holds configurations and no weights, as a download that was stopped leaves it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0" * 40


def hub_cache(path: Path, configs: Mapping[str, Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a cache with one snapshot per hub id, and make it the one that is looked into, without a network.

    An entry with ``peft_type`` is an adapter's configuration.
    """
    import huggingface_hub.constants
    import huggingface_hub.file_download

    cache = path / "hub"
    for name, config in configs.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        file = "adapter_config.json" if "peft_type" in config else "config.json"
        (snapshot / file).write_text(json.dumps(dict(config)))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
    cache.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
