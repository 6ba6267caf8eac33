"""Hand a recipe over to mergekit, in a process of its own, with the safety of our output directories around it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from wpmerge.checkpoint import open_checkpoint
from wpmerge.errors import RecipeError
from wpmerge.output import check_output, mark, output_directory
from wpmerge.writing import MergeSummary


def merge_with_mergekit(
    path: Path, out: Path, *, shard_bytes: int, overwrite: bool, seed: int = 0, trust_remote_code: bool = False
) -> MergeSummary:
    """Run mergekit-yaml on a recipe; the output appears under its name only when mergekit has succeeded.

    Raises:
        RecipeError: mergekit fails; with its last line.
        OutputError: the output cannot be written there.
    """
    began = time.monotonic()
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError("a recipe cannot be read", where=path, got=str(error).replace("\n", " ")) from None
    names = {part for name in _models(document) for part in name.split("+")}
    inputs = [path, *(Path(name) for name in sorted(names) if Path(name).exists())]
    check_output(out, inputs=inputs, overwrite=overwrite)
    with output_directory(out, inputs=inputs, overwrite=overwrite) as directory:
        command = [
            sys.executable,
            "-c",
            "from mergekit.scripts.run_yaml import main; main()",
            str(path.resolve()),
            str(directory),
            f"--out-shard-size={shard_bytes}",
            f"--random-seed={seed}",
            *(["--trust-remote-code"] if trust_remote_code else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RecipeError(
                "mergekit failed", where=path, got=lines[-1] if lines else f"exit status {done.returncode}"
            )
        mark(directory, "a merge that mergekit made")
        merged = open_checkpoint(directory, trust_remote_code=trust_remote_code)
        files = {info.file for info in merged.tensors.values()}
        tensors, nbytes = len(merged.tensors), sum(info.nbytes for info in merged.tensors.values())
    return MergeSummary(out=out, tensors=tensors, nbytes=nbytes, shards=len(files), seconds=time.monotonic() - began)


def _models(document: Any) -> Iterator[str]:
    """Every model that a recipe names, wherever it does."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key in ("model", "base_model") and isinstance(value, str):
                yield value
            elif key in ("model", "base_model") and isinstance(value, dict):
                yield str((value.get("model") or {}).get("path", "") if isinstance(value.get("model"), dict) else "")
            else:
                yield from _models(value)
    elif isinstance(document, list):
        for entry in document:
            yield from _models(entry)
