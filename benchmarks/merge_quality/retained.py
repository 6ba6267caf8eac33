"""What does a merge lose on a retain set's own questions, and on others?

    python -m benchmarks.merge_quality.retained [--smollm2 .family] [--subset format+math …] [--seed 0]

Of SmolLM2's kept plans: `refine` as it is and with all coefficients multiplied by .8, .6 and .4, and `refine` with a
retain set. "judges" are the retain set's questions, which the base asked itself and which decide. "by hand" are 60
questions of one kind that were the retain set before, and "others" the benchmark's of all its seeds, in other words and
of other kinds. Nats per token that the merge finds the base's own replies less likely by; below 0 more likely. Every
merge is read on all three in one run. The last line is JSON.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.merge_quality import prompts
from benchmarks.reporting import conditions
from benchmarks.rules.compare import answered
from wpmerge.calibration import HeldOutReading, assess, merged_source
from wpmerge.fusing import open_scored_family
from wpmerge.models import Family, continuations
from wpmerge.plan import BASE, Coefficient, load_plan
from wpmerge.retaining import joined
from wpmerge.scores import load_scores
from wpmerge.tuning import held_out_readings, reference_limit, scored_readings

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "merge_quality" / "smollm2"
SKILLS = ("format", "math", "json")
SUBSETS = ("format+math", "format+json", "math+json", "format+math+json")
SEEDS = 3
FACTORS = (1.0, 0.8, 0.6, 0.4)


def only_retain(readings: Mapping[str, HeldOutReading]) -> HeldOutReading:
    """The one retain set among readings."""
    (found,) = (each for each in readings.values() if each.retain)
    return found


def others(family: Family) -> HeldOutReading:
    """The benchmark's questions, with the base's kept replies."""
    texts, replies = [], []
    for seed in range(SEEDS):
        texts += prompts.questions(seed=0)[seed::SEEDS]
        replies += json.loads((KEPT / "replies" / f"@base-{seed}.json").read_text(encoding="utf-8"))["replies"]
    return answered(family, "", texts, replies)


def by_hand(family: Family, limit: int) -> HeldOutReading:
    """The package's plain questions, with the base's own replies."""
    texts = json.loads((ROOT / "wpmerge" / "builtin" / "queries.json").read_text(encoding="utf-8"))
    return answered(family, "", texts, continuations(family, "", texts, tokens=limit))


def scaled(coefficients: Mapping[str, Mapping[str, Coefficient]], factor: float) -> dict[str, dict[str, Coefficient]]:
    """All coefficients times a factor."""
    return {
        expert: {name: Coefficient(values=each.values * factor, axis=each.axis) for name, each in tensors.items()}
        for expert, tensors in coefficients.items()
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, default=ROOT / ".family")
    parser.add_argument("--subset", action="append", default=[], help="default: every pair, and all three")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    scores = load_scores(KEPT / "scores")
    models = {BASE: str(given.smollm2 / "base"), **{name: str(given.smollm2 / name) for name in SKILLS}}
    family = open_scored_family(scores, models, device="cpu", resident=True, trust_remote_code=False)
    plain = replace(scores, capabilities={name: each for name, each in scores.capabilities.items() if each.retain})
    sets = [only_retain(read(family, plain, ())) for read in (held_out_readings, scored_readings)]
    readings = {
        "judges": joined(*sets),
        "by hand": by_hand(family, reference_limit(scores)),
        "others": others(family),
    }
    result: dict[str, dict[str, dict[str, float]]] = {}
    for subset in given.subset or SUBSETS:
        free = load_plan(KEPT / "plans" / f"{subset}-fuse-refine-{given.seed}").coefficients
        kept = load_plan(KEPT / "plans" / f"{subset}-fuse-refine+retain-{given.seed}").coefficients
        merges = {f"refine x {factor}": scaled(free, factor) for factor in FACTORS} | {"with a retain set": kept}
        for name, coefficients in merges.items():
            experts = {expert: family.weights[expert] for expert in coefficients}
            merged = merged_source(family.engine, family.weights[""], experts, coefficients)
            lost = assess(family.engine, merged, readings).lost
            result.setdefault(subset, {})[name] = {each: round(value, 4) for each, value in lost.items()}
            print(f"{subset}, {name}: " + ", ".join(f"{each} {value:+.3f}" for each, value in lost.items()), flush=True)
    questions = {name: each.readout.items for name, each in readings.items()}
    print(
        json.dumps(
            {
                "benchmark": "merge_quality/retained",
                "seed": given.seed,
                "questions": questions,
                "lost": result,
                **conditions(threads=torch.get_num_threads()),
            }
        )
    )


if __name__ == "__main__":
    main()
