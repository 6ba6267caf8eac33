"""A merge against its lower bound: every input read once, the output written once, nothing computed.

    python benchmarks/merge/bound.py RECIPE FOLDER REPEATS THREADS

Both in turns in one process, with the same reads by position, block size, number of threads and preallocated files; one
merge beforehand, not counted, loads what the others find loaded.
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

BLOCK_BYTES = 2**19


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
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for offset in range(start, stop, BLOCK_BYTES):
        view = buffer[: min(BLOCK_BYTES, stop - offset)]
        for descriptor in inputs:
            os.preadv(descriptor, [view], offset)
        os.pwrite(output, view, offset)


def timed(work: Callable[[], Any], out: Path) -> tuple[float, float]:
    """Wall and CPU seconds; the output is brought to disk and removed outside."""
    os.sync()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    spent = time.perf_counter() - wall, time.process_time() - cpu
    shutil.rmtree(out)
    return spent


def main() -> None:
    """Print one line of JSON: per number of threads, median seconds and ratios of wall and CPU."""
    recipe, folder, repeats, most = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    document = yaml.safe_load(recipe.read_text())
    models = [Path(document["base_model"]), *(Path(model["model"]) for model in document["models"])]
    out, result = folder / "out-bound", {}
    timed(lambda: merge_recipe(recipe, out, threads=most, sync=False), out)
    for threads in sorted({1, most}):
        pairs = []
        for _ in range(repeats):
            least = timed(lambda: read_and_write(models, out, threads), out)  # noqa: B023
            ours = timed(lambda: merge_recipe(recipe, out, threads=threads, sync=False), out)  # noqa: B023
            pairs.append((*least, *ours))
        walls, cpus = [pair[2] / pair[0] for pair in pairs], [pair[3] / pair[1] for pair in pairs]
        result[f"threads_{threads}"] = {
            name: round(statistics.median(pair[i] for pair in pairs), 3)
            for i, name in enumerate(("bound_wall_s", "bound_cpu_s", "merge_wall_s", "merge_cpu_s"))
        } | {
            name: [round(f(found), 3) for f in (statistics.median, min, max)]
            for name, found in (("wall_ratio", walls), ("cpu_ratio", cpus))
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
