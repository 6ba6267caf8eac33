"""Do the units that weight patching names carry the skill? `wpmerge prove` on a family, in one table.

    python -m benchmarks.faithfulness.run WORK [--family demo] [--out FILE]
    python -m benchmarks.faithfulness.run WORK --family smollm2 --models .family --shared ../shared/family
    python -m benchmarks.faithfulness.run WORK --judged 24       # also the share of replies that are judged right

Scores the family and proves the scores under WORK; what is there is used again. The SmolLM2 family takes fewer prompts,
shares and random rankings. With --judged, replies to test prompts that no score has seen are generated and judged too
(by IFEval's checkers, by the number or the JSON object asked for), along the same curves. Read: areas (CPR) of
transplant and revert by ranking, what `linear` is ahead by with its interval over prompts, rank stability and roles.
The last line is JSON.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.merge_quality import prompts
from benchmarks.reporting import conditions
from wpmerge.console import print_table
from wpmerge.curves import SHARES
from wpmerge.judges import load_tests
from wpmerge.proof import proof_tables
from wpmerge.proving import ProveSettings, prove
from wpmerge.readings import ScoreSettings
from wpmerge.scoring import score

DEMO = Path(__file__).parents[2] / "wpmerge" / "demo_family"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A family, its prompts, and how much of it is read."""

    models: Path
    names: Sequence[str]
    prompts: Path
    score: ScoreSettings
    prove: ProveSettings


def demo(_: argparse.Namespace) -> Setup:
    """The family that comes with the package."""
    scoring = ScoreSettings(
        prompts=32,
        held_out=16,
        top=4,
        sample=4,
        cross=False,
        accept_anchor=True,
        estimators=("linear", "integrated"),
        directions=("sufficiency", "necessity"),
    )
    return Setup(
        models=DEMO,
        names=("letters", "marks", "frame"),
        prompts=DEMO / "prompts",
        score=scoring,
        prove=ProveSettings(shares=SHARES, randoms=10, roles=True),
    )


def smollm2(args: argparse.Namespace) -> Setup:
    """SmolLM2-135M and its three LoRA experts."""
    scoring = ScoreSettings(prompts=16, held_out=8, top=0, sample=0, cross=False, accept_anchor=True)
    return Setup(
        models=args.models,
        names=("format", "math", "json"),
        prompts=args.shared / "prompts",
        score=scoring,
        prove=ProveSettings(shares=(0.02, 0.1, 0.3), randoms=10, prompts=6, roles=True),
    )


def run(setup: Setup, family: str, work: Path, judged: int) -> Mapping[str, Any]:
    """Score and prove, unless it is done; ``judged``: test prompts per skill."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "scores").exists():
        score(
            base=str(setup.models / "base"),
            experts={name: str(setup.models / name) for name in setup.names},
            capabilities={name: str(setup.prompts / f"{name}.jsonl") for name in setup.names},
            out=work / "scores",
            settings=setup.score,
        )
    proof, tests = work / "proof", {}
    if judged:
        prompts.write(work / "tests")
        proof = work / f"proof-judged-{judged}"
        tests = {name: load_tests(work / "tests" / family / f"{name}.jsonl")[:judged] for name in setup.names}
    if proof.exists():
        found: dict[str, Any] = json.loads((proof / "proof.json").read_text())
        return {"out": str(proof), **found}
    return prove(work / "scores", out=proof, tests=tests, settings=setup.prove)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--family", choices=("demo", "smollm2"), default="demo")
    parser.add_argument("--models", type=Path, default=Path(".family"))
    parser.add_argument("--shared", type=Path, default=Path("../shared/family"))
    parser.add_argument("--judged", type=int, default=0, help="test prompts per skill whose replies are judged")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = run({"demo": demo, "smollm2": smollm2}[args.family](args), args.family, args.work, args.judged)
    for table in proof_tables(found, found["out"]):
        print_table(table)
    result = {"benchmark": "faithfulness", "family": args.family, "proofs": found["capabilities"]}
    result |= {"settings": found["provenance"]["settings"], "seconds": found["provenance"]["seconds"]}
    line = json.dumps(result | conditions(threads=args.threads))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
