"""What a reader needs to repeat a result."""

import json
import platform
import resource
import sys
import time
from importlib.metadata import version
from typing import Any


def provenance(settings: object, started: float, **more: Any) -> dict[str, Any]:
    """What a reader needs to repeat a result: settings, versions, machine, seconds, peak memory in bytes."""
    packages = ("wpmerge", "torch", "transformers", "safetensors", "numpy")
    return {
        "settings": json.loads(json.dumps(settings, default=_plain)),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "machine": platform.machine(),
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        **more,
    }


def _plain(value: object) -> Any:
    slots = getattr(type(value), "__slots__", None)
    return {name: getattr(value, name) for name in slots} if slots else str(value)
