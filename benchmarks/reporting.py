"""What every benchmark result says about where it was measured."""

import subprocess
from pathlib import Path
from typing import Any

from wpmerge.provenance import machine, versions


def conditions(**more: Any) -> dict[str, Any]:
    """Hardware, versions and commit."""
    return {"hardware": machine(), "versions": versions("mergekit", "lm-eval"), "commit": commit(), **more}


def commit() -> str:
    """The checkout's, with ``-dirty`` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip()
