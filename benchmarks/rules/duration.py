"""How long rules take on a real family, from scores to coefficients: models are opened, prompts answered, merges run.

    python -m benchmarks.rules.duration [--scores DIR] [--rule scaled] [--rule refine] [--out FILE]

Run from the repository's root, whose `.family` the kept scores of the SmolLM2 family name, and leave the machine alone.
`refine` knows no retain set, `refine+retain` those of the scores. Each rule starts from the files. The last line is
JSON: seconds of wall and of CPU for each rule, and the ratio to the first.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.reporting import conditions
from wpmerge.fusing import open_scored_family
from wpmerge.rules import FuseSettings, coefficients_for
from wpmerge.scores import load_scores, without_retain_sets

SCORES = Path("benchmarks/results/merge_quality/smollm2/scores")
RULES = ("scaled", "refine", "refine+retain")


def measured(rule: str, place: Path) -> dict[str, float]:
    """Seconds from the scores on disk to coefficients."""
    wall, work = time.monotonic(), time.process_time()
    scores = load_scores(place)
    family = open_scored_family(scores, {}, device="cpu", resident=True, trust_remote_code=False)
    name, _, retain = rule.partition("+")
    found = coefficients_for(
        FuseSettings(rule=name),  # type: ignore[arg-type]
        family,
        scores if retain else without_retain_sets(scores),
    )
    return {
        "wall": round(time.monotonic() - wall, 1),
        "cpu": round(time.process_time() - work, 1),
        "evaluations": found.evaluations,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, default=SCORES)
    parser.add_argument("--rule", action="append", choices=RULES, default=[], help="only this one (default: all)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for rule in args.rule or RULES:
        found[rule] = measured(rule, args.scores)
        print(f"{rule}: {found[rule]}", flush=True)
    first = next(iter(found.values()))
    ratios = {rule: round(each["wall"] / first["wall"], 2) for rule, each in found.items()}
    line = json.dumps(
        {"benchmark": "rules/duration", "rules": found, "ratios": ratios, **conditions(threads=torch.get_num_threads())}
    )
    if args.out:
        args.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
