"""Finished parts of a run on disk, so that a killed run continues where it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from wpmerge.errors import OutputError
from wpmerge.output import write_file


@runtime_checkable
class Keeper(Protocol):
    """Keeps finished parts of a computation by name."""

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Named tensors that were put under a key before, in this run or in a killed one; None if there are none."""

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep named tensors under a key, in place of what was there."""


def _damaged(path: Path, got: object) -> OutputError:
    return OutputError(
        "a finished part of an earlier run is damaged", where=path, got=got, mend="remove the file; it is made again"
    )


class Forget:
    """Keeps nothing: a computation that is cheap to do again."""

    def get(self, key: str) -> None:
        """Nothing was kept."""

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Drop them."""


class Pieces:
    """A directory of finished parts by key; what is there is not computed again.

    Args:
        directory: made where it is missing.
        prefix: before every key.
    """

    def __init__(self, directory: Path, *, prefix: str = "") -> None:
        self._directory, self._prefix = directory, prefix
        directory.mkdir(exist_ok=True)

    def below(self, name: str) -> "Pieces":
        """The same directory, for a part of the work that numbers its own pieces."""
        return Pieces(self._directory, prefix=f"{self._prefix}{name}-")

    def get(self, key: str) -> dict[str, Tensor] | None:
        """See :class:`Keeper`."""
        path = self._path(key, "safetensors")
        if not path.exists():
            return None
        try:
            found: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from None
        return found

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """See :class:`Keeper`."""
        made = {name: value.cpu().contiguous() for name, value in tensors.items()}
        write_file(self._path(key, "safetensors"), safetensors.torch.save(made))

    def tensors(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Named tensors, computed unless they are there."""
        if (found := self.get(key)) is None:
            found = compute()
            self.put(key, found)
        return found

    def record(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A JSON object, computed unless it is there."""
        path = self._path(key, "json")
        if not path.exists():
            write_file(path, json.dumps(compute()))
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from None
        if not isinstance(found, dict):
            raise _damaged(path, f"a JSON {type(found).__name__}")
        return found

    def remove(self) -> None:
        """The run is whole: its parts are no longer needed."""
        shutil.rmtree(self._directory)

    def _path(self, key: str, suffix: str) -> Path:
        return self._directory / f"{self._prefix}{key}.{suffix}"
