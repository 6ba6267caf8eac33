"""What every benchmark result says about where it was measured."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def conditions(**more: Any) -> dict[str, Any]:
    """Hardware, versions and commit."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return {
        "hardware": cpu,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("wpmerge", "torch", "transformers", "safetensors")},
        "commit": commit.stdout.strip(),
        **more,
    }
