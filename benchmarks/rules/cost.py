"""How the cost of rule `refine` grows with experts and prompts.

    python -m benchmarks.rules.cost [--rounds 3] [--out FILE]

On the family that comes with the package, at unit granularity. One quantity is varied at a time, experts as one expert
and its prompts under up to six names, so that each adds the same. Every point is the CPU time of four steps, the least
of the rounds. The last line is JSON: per sweep the points, the straight line fitted to them, and the largest distance
of a point from it, as a share of the line there.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.reporting import conditions
from benchmarks.scoring.cost import fitted, seconds
from wpmerge.calibration import HeldOutReading, read_held_out
from wpmerge.capability import load_capability, reference_sequences
from wpmerge.coefficients import make_grouping
from wpmerge.demo import expert_instructions, family_path
from wpmerge.models import Family, open_family
from wpmerge.readouts import LogProbReadout
from wpmerge.refining import Merging, RefineSettings, refine
from wpmerge.rows import pack

STEPS = 4
PROMPTS = (6, 12, 24, 48)
EXPERTS = (1, 2, 3, 4, 6)
RATE = 1e-6
"""So small that the merge stays where it is, below every skill: a skill that is whole is not run backwards."""


def readings(family: Family, prompts: dict[str, Path], first: int, count: int) -> dict[str, HeldOutReading]:
    """Some of each skill's prompts, with their references."""
    found = {}
    for name, path in prompts.items():
        sequences, starts = reference_sequences(family.chat, load_capability(name, str(path)), None, limit=80)
        own, own_starts = sequences[first : first + count], starts[first : first + count]
        readout = LogProbReadout(layer=family.layout.layers - 1, sequences=own, starts=own_starts)
        found[name] = read_held_out(family.engine, family.weights[""], family.weights[name], readout, pack(own))
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    path = family_path()
    names = list(expert_instructions(path))
    family = open_family(str(path / "base"), {name: str(path / name) for name in names})
    files = {name: path / "prompts" / f"{name}.jsonl" for name in names}
    many, held_out = readings(family, files, 0, max(PROMPTS)), readings(family, files, max(PROMPTS), 2)

    def steps(chosen: list[str], prompts: int) -> None:
        copies = {f"{name} {number}": name for number, name in enumerate(chosen)}
        merging = Merging(
            engine=family.engine,
            base=family.weights[""],
            experts={copy: family.weights[name] for copy, name in copies.items()},
            grouping=make_grouping(family.layout, "unit"),
        )
        start = torch.full((len(copies), len(merging.grouping.names)), 0.3 / len(copies), dtype=torch.float64)
        settings = RefineSettings(steps=STEPS, batch=prompts, check=10_000, rate=RATE)
        refine(
            merging,
            start,
            {copy: many[name] for copy, name in copies.items()},
            {copy: held_out[name] for copy, name in copies.items()},
            settings,
        )

    result = {
        "benchmark": "rules/cost",
        "experts": fitted(EXPERTS, [seconds(lambda n=n: steps(names[:1] * n, 24), args.rounds) for n in EXPERTS]),  # type: ignore[misc]
        "prompts": fitted(PROMPTS, [seconds(lambda n=n: steps(names, n), args.rounds) for n in PROMPTS]),  # type: ignore[misc]
        **conditions(threads=torch.get_num_threads(), steps=STEPS),
    }
    line = json.dumps(result)
    if args.out:
        args.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
