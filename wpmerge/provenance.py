"""What a reader needs to repeat a result."""

import json
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance(settings: object, started: float, **more: Any) -> dict[str, Any]:
    """What a reader needs to repeat a result: settings, versions, machine, seconds, peak memory in bytes."""
    return {
        "settings": json.loads(json.dumps(settings, default=_plain)),
        "versions": versions(),
        "machine": machine(),
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        **more,
    }


def versions(*more: str) -> dict[str, str]:
    """Python's and the packages' that every result depends on, and of ``more`` packages."""
    packages = ("wpmerge", "torch", "transformers", "safetensors", "numpy", *more)
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


def machine() -> str:
    """The processor, and how many of it: as Linux names it, otherwise its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}, {platform.machine()}" if names else platform.machine()


def _plain(value: object) -> Any:
    slots = getattr(type(value), "__slots__", None)
    return {name: getattr(value, name) for name in slots} if slots else str(value)
