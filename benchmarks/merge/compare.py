"""wpmerge's merge against mergekit-yaml and against the cost of reading and writing alone.

    python -m benchmarks.merge.compare            # 1.03 billion parameters; 20 GB of disk, some 20 minutes
    python -m benchmarks.merge.compare --small    # a quick look

Random bfloat16 Llamas, a base and three experts in four shards each, are made in a temporary folder. Every measured
run is a process of its own with warm inputs; bringing the output to disk is left out on both sides, and outputs are
compared. The last line is JSON; ``--results FOLDER`` keeps it with hardware, versions and commit.
"""

import argparse
import compileall
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from benchmarks.merge.models import make_family
from benchmarks.processes import measure

HERE = Path(__file__).resolve().parent
OURS = "import os, sys; os.fsync = lambda file: None; from wpmerge.cli import main; main()"
"""The command line as it is, but for bringing the output to disk."""


def family_at(place: Path, size: str) -> list[Path]:
    """The models in a folder, made there where it is missing; the base first."""
    return sorted(place.iterdir()) if place.is_dir() else make_family(place, size)


def write_recipe(path: Path, models: list[Path], method: str) -> Path:
    """A mergekit recipe: float32 maths, bfloat16 out, weights 0.4, 0.3, 0.5."""
    settings: dict[str, Any] = {"density": 0.5} if method == "ties" else {}
    document = {
        "models": [
            {"model": str(model), "parameters": {"weight": weight} | settings}
            for model, weight in zip(models[1:], (0.4, 0.3, 0.5), strict=True)
        ],
        "merge_method": method,
        "base_model": str(models[0]),
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def our_command(recipe: Path, out: Path, threads: int) -> list[str]:
    """``wpmerge merge`` on a recipe."""
    options = ["--out", str(out), "--threads", str(threads)]
    return [sys.executable, "-c", OURS, "merge", str(recipe), *options]


def warm(models: list[Path]) -> None:
    """Read every input once, so that it lies in the page cache."""
    buffer = bytearray(2**22)
    for model in models:
        for file in sorted(model.glob("*.safetensors")):
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass


def compare_outputs(ours: Path, theirs: Path) -> dict[str, float]:
    """The share of elements that differ, and the most places in the last digit by which one does."""
    import torch

    from wpmerge.checkpoint import open_checkpoint

    one, other = open_checkpoint(ours), open_checkpoint(theirs)
    assert list(one.tensors) == list(other.tensors)
    differ = worst = count = 0
    for name, info in one.tensors.items():
        for start in range(0, info.numel, 2**22):
            stop = min(start + 2**22, info.numel)
            a, b = (model.load_elements(name, start, stop).view(torch.int16).int() for model in (one, other))
            distance = (a - b).abs()
            differ += int((distance > 0).sum())
            worst = max(worst, int(distance.max()))
            count += stop - start
    return {"share": differ / count, "most_places": worst, "elements": count}


def race(work: Path, models: list[Path], method: str, *, ours: int, theirs: int, threads: int) -> dict[str, Any]:
    """Both tools on one recipe, in turns."""
    recipe = write_recipe(work / f"{method}.yml", models, method)
    mergekit = str(Path(sys.executable).with_name("mergekit-yaml"))
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "ours_one_thread": [], "mergekit": []}
    compared = None
    for i in range(max(ours, theirs)):
        turns = [("ours", threads), ("ours_one_thread", 1)] if i < ours else []
        for who, count in [*turns, *([("mergekit", 0)] if i < theirs else [])]:
            warm(models)
            out = work / f"out-{'mergekit' if who == 'mergekit' else 'ours'}"
            shutil.rmtree(out, ignore_errors=True)
            command = our_command(recipe, out, count)
            if who == "mergekit":
                command = [mergekit, str(recipe), str(out)]
            runs[who].append(measure(command, work / "log"))
            print(method, who, json.dumps(runs[who][-1]), file=sys.stderr, flush=True)
        if compared is None and i < theirs:
            compared = compare_outputs(work / "out-ours", work / "out-mergekit")
            print(method, "differ", compared, file=sys.stderr, flush=True)
    for name in ("out-ours", "out-mergekit"):
        shutil.rmtree(work / name, ignore_errors=True)
    return {**{who: summary(found) for who, found in runs.items() if found}, "compared": compared}


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Median, least and most of every quantity."""
    keys = runs[0]
    return {key: [round(f([run[key] for run in runs]), 3) for f in (statistics.median, min, max)] for key in keys} | {
        "runs": len(runs)
    }


def ratios(result: dict[str, Any], who: str, key: str) -> dict[str, float]:
    """mergekit's cost over ours: of medians, and the least and most favourable pair."""
    ours, theirs = result[who][key], result["mergekit"][key]
    return {
        "ratio": round(theirs[0] / ours[0], 2),
        "least": round(theirs[1] / ours[2], 2),
        "most": round(theirs[2] / ours[1], 2),
    }


def against_bound(work: Path, models: list[Path], repeats: int, threads: int) -> dict[str, Any]:
    """Merging against reading all inputs and writing the output once, in turns in one process."""
    recipe = write_recipe(work / "bound.yml", models, "task_arithmetic")
    warm(models)
    command = [sys.executable, str(HERE / "bound.py"), str(recipe), str(work), str(repeats), str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def hardware() -> dict[str, Any]:
    """The machine, the versions and the commit."""
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=HERE
    )
    return {
        "processor": processor[0].split(":")[1].strip() if processor else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in ("wpmerge", "mergekit", "torch", "numpy", "numba")},
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Make the models, run everything, print the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a model of 60 million parameters")
    parser.add_argument("--repeats", type=int, default=5, help="of ours; mergekit runs twice, and once for TIES")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--skip-ties", action="store_true")
    parser.add_argument("--skip-double", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the models are made; a temporary folder by default")
    parser.add_argument(
        "--models", type=Path, help="a folder that keeps the models, where an earlier run has left them"
    )
    parser.add_argument("--results", type=Path, help="a folder to keep the result in")
    arguments = parser.parse_args()
    size = "small" if arguments.small else "full"
    result: dict[str, Any] = {"benchmark": "merge", "size": size, "threads": arguments.threads} | hardware()
    compileall.compile_dir(HERE.parents[1] / "wpmerge", quiet=1)  # as pip does where it installs, mergekit among them
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        work = Path(folder)
        kept = arguments.models or work
        tiny, models = (family_at(kept / name, name) for name in ("tiny", size))
        result["start"] = race(work, tiny, "task_arithmetic", ours=3, theirs=2, threads=arguments.threads)
        result["bound"] = against_bound(work, models, arguments.repeats, arguments.threads)
        print("bound", json.dumps(result["bound"]), file=sys.stderr, flush=True)
        methods = {"task_arithmetic": min(2, arguments.repeats)} | ({} if arguments.skip_ties else {"ties": 1})
        for method, theirs in methods.items():
            result[method] = race(
                work, models, method, ours=arguments.repeats, theirs=theirs, threads=arguments.threads
            )
        shutil.rmtree(work / size, ignore_errors=True)
        if not arguments.small and not arguments.skip_double:
            models = family_at(kept / "double", "double")
            recipes = {method: write_recipe(work / f"{method}.yml", models, method) for method in methods}
            result["double"] = {}
            for method, recipe in recipes.items():
                command = our_command(recipe, work / "out", arguments.threads)
                result["double"][method] = measure(command, work / "log")
                shutil.rmtree(work / "out")
    for method in methods:
        result[f"{method}_ratios"] = {
            f"{who}_{key}": ratios(result[method], who, key)
            for who in ("ours", "ours_one_thread")
            for key in ("wall_s", "cpu_s", "rss_mb")
        }
    line = json.dumps(result)
    if arguments.results:
        arguments.results.mkdir(parents=True, exist_ok=True)
        (arguments.results / f"merge-{size}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(line)


if __name__ == "__main__":
    main()
