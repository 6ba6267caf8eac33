"""Merging strategies × subsets × skills on both families: every rival tuned, our rules and their controls beside them.

    python -m benchmarks.merge_quality.run [--family demo] [--smollm2 .family] [--shared ../shared/family] [--quick]

Scores are taken (or found) in WORK, fresh test prompts written there, and `wpmerge bench` run; a killed run goes on
where it was. Results go to OUT/{family}: results.jsonl (a line per strategy, subset and seed, with every outcome),
bench.json and table.md; of SmolLM2 also scores and reference replies, so that an empty WORK goes on from what OUT
holds. Prints the tables, and in the last line a JSON object with what beat what, hardware, versions and commit.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.merge_quality import prompts
from benchmarks.reporting import commit, conditions
from wpmerge.bench import BenchResult, bench
from wpmerge.bench_results import BASE_MODEL, EXPERT_MODEL, ResultFile
from wpmerge.bench_setup import BenchSettings
from wpmerge.bench_table import Measure, make_cell
from wpmerge.cli_bench import cell_table, markdown
from wpmerge.plan import BASE
from wpmerge.questions import QuestionSettings, write_questions
from wpmerge.readings import ScoreSettings
from wpmerge.scoring import score
from wpmerge.strategies import RIVALS

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "wpmerge" / "demo_family"
SMOLLM2_STRATEGIES = (
    "scaled",
    "fuse:refine-expert",
    "fuse:refine-tensor",
    "fuse:refine",
    "fuse:refine/shuffled",
    "fuse:refine/norm",
    *RIVALS,
    "fuse:proportional",
    "fuse:select",
    "fuse:select/shuffled",
    "fuse:joint",
    "fuse:refine+retain",
)
ASKED = 120
"""Questions of SmolLM2's retain set."""
QUICK_STRATEGIES = ("uniform", "scaled", "ties", "fuse:select", "fuse:select/shuffled")


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySetup:
    """One family: where it is, and what it is scored and benched with.

    Attributes:
        name: of its folder of results.
        models: directory of base and experts.
        capabilities: directory of the prompts that scores and tuning draw from.
        skills: the experts, in order.
        asked: questions that the base is let ask itself, for a retain set that our rules may be told to keep; 0 for
            none. The benchmark's own questions outside every skill are others.
        score: how scores are taken; ``held_out`` is the pool that each seed draws its tuning prompts from.
        bench: how strategies are compared.
    """

    name: str
    models: Path
    capabilities: Path
    skills: tuple[str, ...]
    asked: int = 0
    score: ScoreSettings
    bench: BenchSettings


def demo(quick: bool) -> FamilySetup:
    """The family that comes with the package."""
    return FamilySetup(
        name="demo",
        models=DEMO,
        capabilities=DEMO / "prompts",
        skills=("letters", "marks", "frame"),
        score=ScoreSettings(readouts=("reference",), prompts=48, held_out=48, reference_tokens=80, top=0, sample=0),
        bench=_quick() if quick else BenchSettings(tune=24, longest=80),
    )


def smollm2(models: Path, shared: Path, quick: bool) -> FamilySetup:
    """SmolLM2-135M and its three LoRA experts."""
    few = {"prompts": 8, "held_out": 16} if quick else {"prompts": 70, "held_out": 25}
    return FamilySetup(
        name="smollm2",
        models=models,
        capabilities=shared / "prompts",
        skills=prompts.SMOLLM2,
        asked=ASKED,
        score=ScoreSettings(readouts=("reference",), reference_tokens=64, top=0, sample=0, **few),  # type: ignore[arg-type]
        bench=_quick()
        if quick
        else BenchSettings(
            strategies=SMOLLM2_STRATEGIES, tune=12, evaluations=16, longest=96, batch_size=96, finalists=2
        ),
    )


def _quick() -> BenchSettings:
    return BenchSettings(seeds=(0,), evaluations=5, tune=4, tests=12, longest=64)


def run(
    family: FamilySetup,
    work: Path,
    *,
    strategies: tuple[str, ...],
    subsets: tuple[tuple[str, ...], ...],
    seeds: tuple[int, ...],
    every_seed: bool,
    quick: bool,
) -> BenchResult:
    """Score if there are no scores yet, write test prompts, and bench what is missing; see `main` for the options."""
    place = work / f"{family.name}{'-quick' if quick else ''}"
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "scores").exists():
        if family.asked:
            write_questions(
                str(family.models / "base"),
                place / "plain.jsonl",
                settings=QuestionSettings(count=family.asked),
                overwrite=True,
                progress=_say,
            )
        score(
            base=str(family.models / "base"),
            experts={name: str(family.models / name) for name in family.skills},
            capabilities={name: str(family.capabilities / f"{name}.jsonl") for name in family.skills},
            out=place / "scores",
            retain={"plain": str(place / "plain.jsonl")} if family.asked else {},
            settings=family.score,
            progress=_say,
        )
    prompts.write(place / "tests")
    tests = place / "tests" / family.name
    changes: dict[str, Any] = {
        "strategies": strategies or (QUICK_STRATEGIES if quick else family.bench.strategies),
        "only_seeds": seeds,
        "label": commit(),
    }
    if every_seed:
        changes["finalists"] = None
    if subsets or quick:
        changes["subsets"] = subsets or (family.skills,)
    fields = {name: getattr(family.bench, name) for name in BenchSettings.__slots__}
    return bench(
        place / "scores",
        place / "bench",
        tests={name: tests / f"{name}.jsonl" for name in family.skills},
        retain=tests / "retain.jsonl",
        models={BASE: str(family.models / "base"), **{name: str(family.models / name) for name in family.skills}},
        settings=BenchSettings(**{**fields, **changes}),
        progress=_say,
    )


_said = {"stage": ""}


def _say(stage: str, done: int, total: int) -> None:
    if stage != _said["stage"]:
        _said["stage"] = stage
        print(f"{time.strftime('%H:%M:%S')} {stage} ({done}/{total})", file=sys.stderr, flush=True)


TAKEN_UP = ("results.jsonl", "identity.json")
"""What `bench` goes on from, besides scores and replies."""


def take_up(out: Path, place: Path) -> None:
    """Put the scores, replies and results that an earlier run kept where this one works, if nothing is there."""
    if place.exists() or not (out / "scores").exists():
        return
    shutil.copytree(out / "scores", place / "scores")
    for folder in ("replies", "plans"):  # a control takes its rule's coefficients from the plan
        if (out / folder).exists():
            shutil.copytree(out / folder, place / "bench" / folder)
    for name in TAKEN_UP:
        shutil.copy(out / name, place / "bench" / name)


def keep(result: BenchResult, out: Path, summary: Mapping[str, Any], *, resumable: bool) -> str:
    """Copy what is kept, and return the tables; ``resumable``: also what :func:`take_up` needs.

    What is kept already and was not made here, or taken up, is never overwritten.
    """
    text = "\n\n".join(markdown(cell_table(cell)) for cell in result.cells) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    kept, made = (ResultFile(place / "results.jsonl").records for place in (out, result.out))
    if lost := len(kept.keys() - made.keys()):
        print(f"{out} keeps {lost} results that were not run here and is left alone; see {result.out}", file=sys.stderr)
        return text
    for name in (*TAKEN_UP, "bench.json"):
        shutil.copy(result.out / name, out / name)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if resumable:
        for folder in (result.out.parent / "scores", result.out / "replies", result.out / "plans"):
            if folder.exists():
                shutil.copytree(folder, out / folder.name, dirs_exist_ok=True)
        named = out / "scores" / "scores.json"  # models as seen from the repository's root, where benchmarks are run
        models = named.read_text(encoding="utf-8").replace(f"{ROOT}/", "").replace(f"{ROOT.parent}/", "../")
        named.write_text(models, encoding="utf-8")
    if result.cells:
        (out / "table.md").write_text(text, encoding="utf-8")
    return text


def kept_tables(out: Path, seeds: tuple[int, ...], against: str | None) -> str:
    """The tables of what is kept: of the first seed, and of every further seed for the strategies that went on to it.

    Args:
        out: holds results.jsonl.
        seeds: the benchmark's.
        against: the strategy that differences are taken to; None for the best rival.
    """
    records = ResultFile(out / "results.jsonl").records
    found = dict.fromkeys((subset, name) for subset, name, _ in records if name not in (BASE_MODEL, EXPERT_MODEL))
    rivals = list(RIVALS) if against is None else [against]
    texts = []
    for subset in dict.fromkeys(subset for subset, _ in found):
        tables: dict[tuple[str, ...], tuple[int, ...]] = {}  # strategies → the seeds that all of them have finished
        for some in (seeds[:count] for count in range(1, len(seeds) + 1)):
            if names := tuple(n for of, n in found if of == subset and all((of, n, seed) in records for seed in some)):
                tables[names] = some
        for names, some in tables.items():
            if against is not None and against not in names:
                texts.append(f"{'+'.join(subset)}, {len(some)} seeds: {against} has not run there")
                continue
            cells = [
                make_cell(records, subset, names, rivals=rivals, measure=each, seeds=some) for each in get_args(Measure)
            ]
            texts += [markdown(cell_table(cell)) for cell in cells if cell is not None]
        if left := [n for of, n in found if of == subset and (of, n, seeds[0]) not in records]:
            texts.append(f"{'+'.join(subset)}: without a first seed, and left out: {', '.join(left)}")
    return "\n\n".join(texts)


def headline(result: BenchResult) -> dict[str, Any]:
    """Per subset, by generated text: the best rival and our best, mean and minimum, and the paired differences."""
    found = {}
    for cell in result.cells:
        if cell.measure != "generated":
            continue
        ours = [row for row in cell.rows if row.strategy.startswith("fuse:") and "/" not in row.strategy]
        rivals = {row.strategy: row for row in cell.rows}
        best = max(ours, key=lambda row: row.mean.value, default=None)
        found["+".join(cell.subset)] = {
            "seeds": len(cell.seeds),
            "best rival by mean": [cell.best_mean, round(rivals[cell.best_mean].mean.value, 3)],
            "best rival by minimum": [cell.best_minimum, round(rivals[cell.best_minimum].minimum.value, 3)],
            "our best by mean": None if best is None else best.strategy,
            "difference of means": _numbers(best and best.mean_difference),
            "difference of minima": _numbers(best and best.minimum_difference),
        }
    return found


def _numbers(interval: Any) -> list[float] | None:
    return None if interval is None else [round(x, 3) for x in (interval.value, interval.low, interval.high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("demo", "smollm2"), action="append", help="only this one (default: both)")
    parser.add_argument("--smollm2", type=Path, default=ROOT / ".family", help="the SmolLM2 family (default: .family)")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "family", help="its prompts' folder")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "merge_quality", help="scores, replies, plans")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "merge_quality")
    parser.add_argument("--strategy", action="append", default=[], help="only this one (default: all)")
    parser.add_argument("--subset", action="append", default=[], help="only these experts, as a+b (default: all)")
    parser.add_argument(
        "--only-seed", type=int, action="append", default=[], choices=BenchSettings().seeds, help="only this one"
    )
    parser.add_argument(
        "--every-seed", action="store_true", help="on later seeds run what is asked for, whether among the best or not"
    )
    parser.add_argument(
        "--kept", action="store_true", help="run nothing: the tables of what OUT keeps, in table.md too"
    )
    parser.add_argument("--against", help="with --kept: differences to this strategy (default: to the best rival)")
    parser.add_argument("--quick", action="store_true", help="under ten minutes: few prompts, no number to be believed")
    arguments = parser.parse_args()
    setups = {
        "demo": demo(arguments.quick),
        "smollm2": smollm2(arguments.smollm2, arguments.shared, arguments.quick),
    }
    last: dict[str, Any] = {}
    for name in arguments.family or list(setups):
        began = time.monotonic()
        out = arguments.out / (f"{name}-quick" if arguments.quick else name)
        if arguments.kept:
            if not (out / "results.jsonl").exists():
                parser.error(f"{out} keeps no results (--out)")
            text = kept_tables(out, setups[name].bench.seeds, arguments.against)
            if arguments.against is None:
                (out / "table.md").write_text(text + "\n", encoding="utf-8")
            print(text)
            continue
        take_up(out, arguments.work / out.name)
        result = run(
            setups[name],
            arguments.work,
            strategies=tuple(arguments.strategy),
            subsets=tuple(tuple(text.split("+")) for text in arguments.subset),
            seeds=tuple(arguments.only_seed),
            every_seed=arguments.every_seed,
            quick=arguments.quick,
        )
        spent = round(time.monotonic() - began)
        last[name] = {"subsets": headline(result), "seconds of this call": spent}
        summary = conditions(threads=torch.get_num_threads(), **last[name])
        print(keep(result, out, summary, resumable=name == "smollm2" and not arguments.quick))
    if not arguments.kept:
        print(json.dumps(conditions(threads=torch.get_num_threads(), families=last)))


if __name__ == "__main__":
    main()
