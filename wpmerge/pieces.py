"""Finished parts of a run on disk, so that a killed run continues where it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from wpmerge.output import write_file


class Pieces:
    """A directory of finished parts by key; what is there is not computed again.

    Args:
        directory: made where it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(exist_ok=True)

    def tensors(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Named tensors, computed unless they are there."""
        path = self._directory / f"{key}.safetensors"
        if not path.exists():
            made = {name: value.contiguous() for name, value in compute().items()}
            write_file(path, safetensors.torch.save(made))
        found: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
        return found

    def record(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A JSON object, computed unless it is there."""
        path = self._directory / f"{key}.json"
        if not path.exists():
            write_file(path, json.dumps(compute()))
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def remove(self) -> None:
        """The run is whole: its parts are no longer needed."""
        shutil.rmtree(self._directory)
