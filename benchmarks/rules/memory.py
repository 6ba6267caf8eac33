"""Rule `refine` within a bound on memory: does its peak stay below, and does the bound change what comes out?

A random Llama family of 0.21 billion parameters each, a base and two experts, is made in a temporary folder, scored
and fused by `wpmerge fuse --plan-only` in processes of their own: without a bound, and with `--max-memory` at the
least that the command itself asks for. Peak memory is read from /proc. The last line is JSON.

    python -m benchmarks.rules.memory [--size fusing] [--steps 2] [--out FILE]
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.merge.models import SIZES, make_family
from benchmarks.processes import measure
from benchmarks.reporting import conditions
from benchmarks.scoring.streaming import write_tokenizer
from wpmerge.plan import Plan, load_plan

EXPERTS = ("a", "b")
WORDS, REPLY, HELD_OUT = 48, 3, 4
"""Tokens of a prompt, the most of a reply, and prompts that decide where to stop."""


def write_prompts(path: Path, count: int, vocabulary: int, seed: int) -> None:
    """Prompts of random words; the replies are the expert's own."""
    generator = random.Random(seed)
    prompts = [" ".join(f"w{generator.randrange(2, vocabulary)}" for _ in range(WORDS)) for _ in range(count)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def command(name: str, *parts: object) -> list[str]:
    """A command of wpmerge, by this interpreter."""
    return [sys.executable, "-m", "wpmerge", name, *map(str, parts)]


def score(folder: Path, batch: int) -> list[str]:
    """What scores the family on as many prompts as a step takes."""
    parts: list[object] = ["--base", folder / "base", "--out", folder / "scores", "--readout", "reference"]
    for number, name in enumerate(EXPERTS):
        parts += ["--expert", f"{name}={folder / f'expert{number}'}", "--capability", f"{name}={folder / name}.jsonl"]
    parts += ["--prompts", batch, "--held-out", HELD_OUT, "--reference-tokens", REPLY, "--kind", "norm"]
    return command("score", *parts, "--no-cross", "--top-k", 0, "--random-sample", 0, "--accept-anchor")


def least_memory(fuse: list[str]) -> float:
    """The MB that `fuse` says it needs at least."""
    found = subprocess.run([*fuse, "--out", "none", "--max-memory", "1MB"], capture_output=True, text=True, check=False)
    least = re.search(r"at least ([\d,]+) MB", found.stderr)
    if least is None:
        raise SystemExit(f"no bound was refused:\n{found.stderr[-2000:]}")
    return float(least[1].replace(",", ""))


def largest_difference(one: Plan, other: Plan) -> float:
    """Of the utility at the looks between steps, which tells steps apart also where the start is the best of them."""
    looks = zip(one.provenance["checks"], other.provenance["checks"], strict=True)
    return float(max(abs(a[1] - b[1]) for a, b in looks))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="fusing")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to make the models; default: the system's temporary folder")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = Path(made)
        for path in make_family(folder, args.size, experts=len(EXPERTS)):
            write_tokenizer(path, SIZES[args.size]["vocab"])
        for number, name in enumerate(EXPERTS):
            write_prompts(folder / f"{name}.jsonl", args.batch + HELD_OUT, SIZES[args.size]["vocab"], number)
        measure(score(folder, args.batch), folder / "log", threads)
        fuse = command("fuse", folder / "scores", "--plan-only", "--scale", 0.5, "--steps", args.steps)
        fuse += ["--batch", str(args.batch)]
        least = least_memory(fuse)
        options = {"bounded": ["--max-memory", f"{least * 1.02:.0f}MB"], "resident": []}
        runs = {}
        for name, more in options.items():
            runs[name] = measure([*fuse, "--out", str(folder / name), *more], folder / "log", threads)
            print(f"{name}: {runs[name]['wall_s']:.0f} s, {runs[name]['rss_mb']:,.0f} MB", file=sys.stderr)
        plans = [load_plan(folder / name) for name in options]
        apart = largest_difference(*plans)
    line = json.dumps(summary(runs, least * 1.02, apart, plans[0].provenance["checks"], args))
    if args.out:
        args.out.write_text(line + "\n", encoding="utf-8")
    print(line)


def summary(
    runs: dict[str, dict[str, float]], bound: float, apart: float, checks: list[tuple[int, float]], args: Any
) -> dict[str, Any]:
    """What is kept of a run."""
    return {
        "benchmark": "rules/memory",
        "bound MB": round(bound),
        "peak resident MB": {name: round(run["rss_mb"]) for name, run in runs.items()},
        "peak / bound": round(runs["bounded"]["rss_mb"] / bound, 3),
        "seconds": {name: round(run["wall_s"], 1) for name, run in runs.items()},
        "CPU seconds": {name: round(run["cpu_s"], 1) for name, run in runs.items()},
        "largest difference of the utility at a look": apart,
        "utility at the looks": [worth for _, worth in checks],
        **conditions(size=args.size, steps=args.steps, batch=args.batch, threads=args.threads),
    }


if __name__ == "__main__":
    main()
