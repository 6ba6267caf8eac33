"""How long rules take on a real family, from scores to coefficients: models are opened, prompts answered, merges run.

    python -m benchmarks.rules.duration [--scores DIR] [--rule scaled] [--rule refine] [--out FILE]

Run from the repository's root, whose `.family` the kept scores of the SmolLM2 family name, and leave the machine alone.
`refine` knows no retain set, `refine+retain` those of the scores. Each rule starts from the files. The last line is
JSON: seconds of wall and of CPU for each rule, the seconds at which each of its phases began, and the ratio to the
first. What `refine+retain` does until it begins to keep to the retain sets is `refine`.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.reporting import conditions
from wpmerge.fusing import open_scored_family
from wpmerge.rules import FuseSettings, coefficients_for
from wpmerge.scores import load_scores, without_retain_sets

SCORES = Path("benchmarks/results/merge_quality/smollm2/scores")
RULES = ("scaled", "refine", "refine+retain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """What one rule took.

    Attributes:
        wall: seconds.
        cpu: seconds, of all threads.
        evaluations: merges run to choose numbers.
        began: name of a phase → seconds of wall after which it began.
    """

    wall: float
    cpu: float
    evaluations: int
    began: dict[str, float]


def measured(rule: str, place: Path) -> Duration:
    """From the scores on disk to coefficients."""
    wall, work = time.monotonic(), time.process_time()
    began: dict[str, float] = {}

    def tell(phase: str, _done: int, _total: int) -> None:
        began.setdefault(phase, round(time.monotonic() - wall, 1))

    scores = load_scores(place)
    family = open_scored_family(scores, {}, device="cpu", resident=True, trust_remote_code=False)
    name, _, retain = rule.partition("+")
    found = coefficients_for(
        FuseSettings(rule=name),  # type: ignore[arg-type]
        family,
        scores if retain else without_retain_sets(scores),
        progress=tell,
    )
    return Duration(
        wall=round(time.monotonic() - wall, 1),
        cpu=round(time.process_time() - work, 1),
        evaluations=found.evaluations,
        began=began,
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, default=SCORES)
    parser.add_argument("--rule", action="append", choices=RULES, default=[], help="only this one (default: all)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Duration] = {}
    for rule in args.rule or RULES:
        found[rule] = measured(rule, args.scores)
        print(f"{rule}: {found[rule]}", flush=True)
    first = next(iter(found.values()))
    ratios = {rule: round(each.wall / first.wall, 2) for rule, each in found.items()}
    rules = {rule: asdict(each) for rule, each in found.items()}
    seen = conditions(threads=torch.get_num_threads())
    line = json.dumps({"benchmark": "rules/duration", "rules": rules, "ratios": ratios, **seen})
    if args.out:
        args.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
