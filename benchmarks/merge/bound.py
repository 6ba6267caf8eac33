"""A merge against its lower bound: every input read once, the output written once, nothing computed.

    python benchmarks/merge/bound.py RECIPE FOLDER REPEATS THREADS

Both in turns in one process, the first of a pair alternating, with the same reads by position, size of a read, number
of threads and preallocated files. Before each, inputs are read into the page cache and what is dirty is brought to
disk; neither brings its own output there. Bytes that came from the disk all the same are counted, and a pair in which
there were many is made again. One merge beforehand, not counted, loads what the others find loaded.
"""

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from wpmerge.merging import merge_recipe

READ_BYTES = 2**17  # as large as the merge's reads (wpmerge.kernels.TILE)
COLD_BYTES = 2**24  # read from disk, from which on a run says nothing
TRIES = 3  # of a pair, until both find their inputs in the page cache


def read_and_write(models: list[Path], out: Path, threads: int) -> None:
    """Read the weights files of all models once and write as many bytes as one of them has."""
    out.mkdir()
    shards = sorted(file.name for file in models[0].glob("*.safetensors"))
    for shard in shards:
        inputs = [os.open(model / shard, os.O_RDONLY) for model in models]
        size = min(os.fstat(descriptor).st_size for descriptor in inputs)
        output = os.open(out / shard, os.O_RDWR | os.O_CREAT)
        os.ftruncate(output, size)
        with ThreadPoolExecutor(threads) as pool:
            step = -(-size // threads)
            list(pool.map(lambda i: _copy(inputs, output, i * step, min(size, (i + 1) * step)), range(threads)))  # noqa: B023
        for descriptor in (*inputs, output):
            os.close(descriptor)


def _copy(inputs: list[int], output: int, start: int, stop: int) -> None:
    buffer = memoryview(bytearray(READ_BYTES))
    for offset in range(start, stop, READ_BYTES):
        view = buffer[: min(READ_BYTES, stop - offset)]
        for descriptor in inputs:
            os.preadv(descriptor, [view], offset)
        os.pwrite(output, view, offset)


def warm(models: list[Path]) -> None:
    """Read every input once, so that it lies in the page cache."""
    buffer = bytearray(2**22)
    for file in (file for model in models for file in sorted(model.glob("*.safetensors"))):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def timed(work: Callable[[], Any], models: list[Path], out: Path) -> dict[str, float]:
    """Wall and CPU seconds, the kernel's share, and bytes that came from the disk; the output is removed outside."""
    warm(models)
    os.sync()
    cold, wall, cpu = _from_disk(), time.perf_counter(), os.times()
    work()
    spent, used = time.perf_counter() - wall, os.times()
    user, system = used.user - cpu.user, used.system - cpu.system
    found = {"wall_s": spent, "cpu_s": user + system, "kernel_s": system, "cold_bytes": _from_disk() - cold}
    shutil.rmtree(out)
    return found


def _from_disk() -> int:
    """Bytes that this process has had read from storage."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def pair(
    sides: dict[str, Callable[[], Any]], models: list[Path], out: Path, *, reverse: bool
) -> dict[str, dict[str, float]]:
    """One run of each side, tried again where an input was not in the page cache."""
    for _ in range(TRIES):
        found = {name: timed(sides[name], models, out) for name in (reversed(sides) if reverse else sides)}
        print(json.dumps(found), file=sys.stderr, flush=True)
        if all(side["cold_bytes"] < COLD_BYTES for side in found.values()):
            break
    return found


def summary(pairs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Each side's median seconds, and the ratios of the pairs: median, least and most."""
    found: dict[str, Any] = {
        f"{side}_{key}": round(statistics.median(each[side][key] for each in pairs), 3)
        for side in ("bound", "merge")
        for key in ("wall_s", "cpu_s", "kernel_s")
    }
    for key in ("wall", "cpu"):
        ratios = [each["merge"][f"{key}_s"] / each["bound"][f"{key}_s"] for each in pairs]
        found[f"{key}_ratio"] = [round(f(ratios), 3) for f in (statistics.median, min, max)]
    cold = max(side["cold_bytes"] for each in pairs for side in each.values())
    return found | {"cold_bytes": cold, "pairs": len(pairs)}


def main() -> None:
    """Print one line of JSON: per number of threads, median seconds, and the ratios' median, least and most."""
    recipe, folder, repeats, most = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    document = yaml.safe_load(recipe.read_text())
    models = [Path(document["base_model"]), *(Path(model["model"]) for model in document["models"])]
    out, result = folder / "out-bound", {}
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # of small files: it waits for the large ones
    merge_recipe(recipe, out, threads=most, sync=False)
    shutil.rmtree(out)
    for threads in sorted({1, most}):
        sides: dict[str, Callable[[], Any]] = {
            "bound": lambda: read_and_write(models, out, threads),  # noqa: B023
            "merge": lambda: merge_recipe(recipe, out, threads=threads, sync=False),  # noqa: B023
        }
        pairs = [pair(sides, models, out, reverse=i % 2 == 1) for i in range(repeats)]
        result[f"threads_{threads}"] = summary(pairs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
