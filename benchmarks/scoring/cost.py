"""How the linear estimator's cost grows with experts, capabilities, prompts and layers.

    python benchmarks/scoring/cost.py FAMILY [--rounds 3] [--out FILE]

FAMILY holds base/, format/, math/ and json/ (the SmolLM2 family). One quantity is varied at a time; every point is the
CPU time of scoring all heads and neurons, the least of the rounds. The last line is JSON: per sweep the points, the
straight line fitted to them, and the largest distance of a point from it, as a share of the line there.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.reporting import conditions
from benchmarks.scoring.speed import anchor_at, contrast_pairs
from wpmerge.arch import Kind
from wpmerge.attribution import linear
from wpmerge.models import Family, open_family
from wpmerge.rows import pack

EXPERTS = ("format", "math", "json")
KINDS: tuple[Kind, ...] = ("head", "neuron")


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """Least CPU time of a call."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def fitted(points: Sequence[int], times: Sequence[float]) -> dict[str, Any]:
    """The line through the points, and how far they are from it."""
    slope, start = np.polyfit(points, times, 1)
    line = start + slope * np.asarray(points)
    return {
        "points": list(points),
        "seconds": [round(t, 3) for t in times],
        "seconds each": round(float(slope), 4),
        "fixed seconds": round(float(start), 3),
        "largest distance from the line": round(float(np.abs(times / line - 1).max()), 3),
    }


def sweeps(family: Family, rounds: int) -> dict[str, Any]:
    """Every quantity in turn, the others fixed."""
    engine, base = family.engine, family.weights[""]
    experts = [family.weights[name] for name in EXPERTS]
    pairs = contrast_pairs(family)
    last = family.layout.layers - 1
    for source in (base, *experts):
        for index in range(last + 1):
            source.layer(index)

    def once(count: int = 1, prompts: int = 32, layer: int = last) -> None:
        sequences = pairs[: 2 * prompts]
        readout = anchor_at(layer, family.layout.hidden, prompts)
        linear(engine, base, experts[:count], pack(sequences), readout, kinds=KINDS)

    def capabilities(count: int) -> None:
        for _ in range(count):
            once(prompts=16)

    depths = [last // 4, last // 2, 3 * last // 4, last]
    return {
        "experts": fitted([1, 2, 3], [seconds(lambda n=n: once(count=n), rounds) for n in (1, 2, 3)]),  # type: ignore[misc]
        "capabilities": fitted([1, 2, 3], [seconds(lambda n=n: capabilities(n), rounds) for n in (1, 2, 3)]),  # type: ignore[misc]
        "prompts": fitted([8, 16, 24, 32], [seconds(lambda n=n: once(prompts=n), rounds) for n in (8, 16, 24, 32)]),  # type: ignore[misc]
        "layers": fitted([d + 1 for d in depths], [seconds(lambda d=d: once(layer=d), rounds) for d in depths]),  # type: ignore[misc]
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    family = open_family(str(args.family / "base"), {name: str(args.family / name) for name in EXPERTS})
    result = {"benchmark": "scoring/cost", **sweeps(family, args.rounds), **conditions(threads=args.threads)}
    line = json.dumps(result)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
