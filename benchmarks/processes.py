"""Commands in processes of their own, and what they took."""

import os
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path


def measure(command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """Run a command, offline: wall and CPU seconds, peak resident and peak anonymous memory in MB (10^6 bytes).

    Memory is read from /proc while it runs: what wait4 gives includes this process, from before the exec.
    """
    os.sync()
    bytecode = {"PYTHONDONTWRITEBYTECODE": ""}  # it stays from start to start, as for whoever installed a package
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | bytecode | dict(environment or {})
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        peaks = {"RssAnon": 0, "VmHWM": 0}
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks), daemon=True)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:4]} failed:\n{log.read_text()[-2000:]}")
    return {
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "rss_mb": peaks["VmHWM"] * 1024 / 1e6,
        "anonymous_mb": peaks["RssAnon"] * 1024 / 1e6,
    }


def _watch(pid: int, peaks: dict[str, int]) -> None:
    while True:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        found = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmHWM:"))}
        if not found:
            return
        for key, value in found.items():
            peaks[key] = max(peaks[key], value)
        time.sleep(0.01)
