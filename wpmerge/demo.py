"""``wpmerge demo``: the whole way on the family that comes with the package, from scores to merges and a report."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from wpmerge import builtin
from wpmerge.coefficients import Rule
from wpmerge.evaluating import evaluate
from wpmerge.evaluation import Evaluation, Skill
from wpmerge.fusing import FuseSettings, fuse
from wpmerge.harness import HarnessSettings
from wpmerge.inmemory import models_to_evaluate
from wpmerge.output import check_output
from wpmerge.readings import Progress, ScoreSettings
from wpmerge.report import write_report
from wpmerge.report_inputs import read_material
from wpmerge.scores import Scores
from wpmerge.scoring import score

SCORE = ScoreSettings(prompts=48, held_out=24, top=8, sample=16)
EVALUATIONS = 24
MAX_GEN_TOKENS = 96
RIVALS: tuple[Rule, ...] = ("uniform", "scaled")
TASK = "demo"
REPORT = "report.html"
METRIC = f"{TASK}/inst_level_strict_acc"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What the demo found.

    Attributes:
        out: holds scores/, merged/, evaluation/, the plans uniform/ and scaled/, and report.html, which shows them.
        scores: of the three experts.
        scales: rival → expert → scale.
        evaluation: base, experts and merges on held-out prompts.
        instructions: expert → the ids of the two instructions it was trained on.
        seconds: wall time.
    """

    out: Path
    scores: Scores
    scales: Mapping[str, Mapping[str, float]]
    evaluation: Evaluation
    instructions: Mapping[str, tuple[str, ...]]
    seconds: float

    @property
    def header(self) -> list[str]:
        """Column names of :attr:`table`."""
        names = [name.split(":")[1] for ids in self.instructions.values() for name in ids]
        return ["model", *names, "retention: mean", "least"]

    @property
    def table(self) -> list[list[str]]:
        """Rows: a model, the share of replies that follow each instruction, mean and least retention over the six."""
        kept = self.evaluation.retention()
        rows = []
        for model, result in self.evaluation.models.items():
            ids = [name for names in self.instructions.values() for name in names]
            cells = [f"{result.scores[f'{METRIC}/{name}'].value:.2f}" for name in ids]
            ends = [f"{kept[model].mean.value:.2f}", f"{kept[model].minimum.value:.2f}"] if model in kept else ["", ""]
            rows.append([model, *cells, *ends])
        return rows


def family_path() -> Path:
    """Where the shipped family lies: base/, one directory per expert, prompts/ and eval.jsonl."""
    return Path(str(files("wpmerge") / "demo_family"))


def expert_instructions(family: Path) -> dict[str, tuple[str, ...]]:
    """Expert → IFEval's ids of the instructions in its scoring prompts, which name them as the built-ins do."""
    ids = {name: builtin.prompts(name)[0]["instruction_id"] for name in builtin.instructions()}
    return {
        path.stem: tuple(sorted({ids[entry["instruction"]] for entry in _read_jsonl(path)}))
        for path in sorted((family / "prompts").glob("*.jsonl"))
    }


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_demo(out: Path | None = None, *, progress: Progress | None = None) -> DemoResult:
    """Score the three experts, fuse them, and evaluate base, experts, the merge and two rivals.

    The rivals are task arithmetic with one scale for all experts and with one per expert, each the best of
    :data:`EVALUATIONS` merges on held-out prompts.

    Args:
        out: the directory to be made; None takes the first free of wpmerge-demo, wpmerge-demo-2, … here.
        progress: told what is being done.

    Raises:
        OutputError: ``out`` cannot be made.
    """
    started = time.monotonic()
    family = family_path()
    instructions = expert_instructions(family)
    out = out or _free_name(Path("wpmerge-demo"))
    check_output(out, inputs=[family], overwrite=False)
    out.mkdir(parents=True)
    experts = {name: str(family / name) for name in instructions}
    capabilities = {name: str(family / "prompts" / f"{name}.jsonl") for name in instructions}
    scores = score(
        base=str(family / "base"),
        experts=experts,
        capabilities=capabilities,
        out=out / "scores",
        settings=SCORE,
        progress=progress,
    )
    rivals = {}
    for rule in RIVALS:
        settings = FuseSettings(rule=rule, evaluations=EVALUATIONS)
        rivals[rule] = fuse(out / "scores", out / rule, settings=settings, plan_only=True, progress=progress)
    fuse(out / "scores", out / "merged", settings=FuseSettings(evaluations=EVALUATIONS), progress=progress)
    harness = HarnessSettings(batch_size=64, max_gen_tokens=MAX_GEN_TOKENS, dtype="float32")
    on_disk = {"base": str(family / "base"), **experts}
    plans: dict[str, str] = {rule: str(out / rule) for rule in RIVALS}  # without weights, merged in memory
    models = models_to_evaluate(on_disk, plans, base="base", inputs={}, settings=harness)
    evaluation = evaluate(
        models | {"fused": str((out / "merged").absolute())},  # lm-eval looks a relative a/b up on the hub
        out=out / "evaluation",
        tasks=(TASK,),
        task_data={TASK: family / "eval.jsonl"},
        base="base",
        skills={
            name.split(":")[1]: Skill(expert=e, metric=f"{METRIC}/{name}")
            for e, ids in instructions.items()
            for name in ids
        },
        settings=harness,
        progress=None if progress is None else lambda name, done, total: progress(f"evaluating {name}", done, total),
    )
    if progress is not None:
        progress("report", 0, 1)
    material = read_material(out / "scores", plan=out / "merged", evaluation=out / "evaluation")
    write_report(material, out=out / REPORT)
    return DemoResult(
        out=out,
        scores=scores,
        scales={rule: found.scales for rule, found in rivals.items()},
        evaluation=evaluation,
        instructions=instructions,
        seconds=time.monotonic() - started,
    )


def _free_name(wanted: Path) -> Path:
    candidate, number = wanted, 1
    while candidate.exists():
        number += 1
        candidate = wanted.with_name(f"{wanted.name}-{number}")
    return candidate
