"""The Evaluation artifact: scores of several models on the same documents, kept with every outcome.

Differences, intervals and retention are computed from the outcomes, so a reader can compute them again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wpmerge.console import finite
from wpmerge.errors import EvaluationError
from wpmerge.output import write_file
from wpmerge.statistics import (
    Interval,
    Outcomes,
    Retention,
    SkillOutcomes,
    bootstrap_scores,
    mean_score,
    percentile_interval,
    pooled,
    retention,
    standard_error,
)

if TYPE_CHECKING:
    import pandas

SCHEMA = 1
FILE = "evaluation.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A metric of one model.

    Attributes:
        value: as lm-eval aggregates it; for accuracies a fraction.
        stderr: standard error with documents as the unit; NaN where it is not known.
        n: documents that count into it.
    """

    value: float
    stderr: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    """What a capability is measured by.

    Attributes:
        expert: name of the model that has it.
        metric: such as ``ifeval/prompt_level_strict_acc``.
    """

    expert: str
    metric: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMetric:
    """How lm-eval makes a group's metric from those of its tasks.

    Attributes:
        members: the tasks' metrics, such as ``mmlu_anatomy/acc``.
        by_size: weighted by documents; otherwise every task counts the same.
    """

    members: Sequence[str]
    by_size: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelResult:
    """One model's outcomes.

    Attributes:
        source: where it came from.
        chat_template: SHA-256 of the applied template, or "server" for a chat server's own; None when none was.
        batch_size: the one that fitted.
        truncated: prompts cut from the left.
        seconds: wall time, loading included.
        scores: metric to score.
        credits: metric to documents × trials; metrics that are not their mean, as perplexities are not, are absent.
    """

    source: str
    chat_template: str | None
    batch_size: int | str
    truncated: int
    seconds: float
    scores: Mapping[str, Score]
    credits: Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Models on the same documents.

    Attributes:
        models: name to result, in the order they were given.
        documents: task to lm-eval's hash of each document, in the order of the credits.
        instructions: task to each document's IFEval instruction ids; other tasks are absent.
        reference: the model that differences are taken to.
        base: the model that retention starts from.
        skills: skill name to what it is measured by.
        groups: metric of a group of tasks, such as ``mmlu/acc``, to how it is made.
        settings: how the models were run.
        provenance: package versions, files and hashes of the documents, wall time in seconds.
    """

    models: Mapping[str, ModelResult]
    documents: Mapping[str, Sequence[str]]
    instructions: Mapping[str, Sequence[Sequence[str]]]
    reference: str | None = None
    base: str | None = None
    skills: Mapping[str, Skill] = field(default_factory=dict)
    groups: Mapping[str, GroupMetric] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read an artifact directory, or its evaluation.json; see :func:`load_evaluation`."""
        return load_evaluation(Path(path))

    def save(self, directory: str | Path) -> None:
        """Write ``evaluation.json`` into a directory, which is made where it is missing."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_file(directory / FILE, to_json(self))

    def to_dataframe(self) -> pandas.DataFrame:
        """A row for every model and metric: ``model``, ``task``, ``metric``, ``value``, ``stderr``, ``n`` documents."""
        import pandas

        rows = [
            {
                "model": name,
                "task": metric.partition("/")[0],
                "metric": metric.partition("/")[2],
                "value": score.value,
                "stderr": score.stderr,
                "n": score.n,
            }
            for name, result in self.models.items()
            for metric, score in result.scores.items()
        ]
        return pandas.DataFrame(rows)

    def outcomes(self, model: str, metric: str) -> Outcomes:
        """Outcomes per document; a metric's name may end in an instruction type, ``…inst_level_strict_acc/TYPE``. A
        group's are its tasks' together.

        Raises:
            EvaluationError: no such model or metric.
        """
        if model not in self.models:
            raise EvaluationError("no such model in the evaluation", got=model, expected=", ".join(self.models))
        found = self._outcomes(model, metric)
        if found is None:
            raise EvaluationError(
                "no outcomes of such a metric in the evaluation",
                where=model,
                got=metric,
                expected=", ".join(
                    each for each in self.models[model].scores if self._outcomes(model, each) is not None
                ),
            )
        return found

    def _outcomes(self, model: str, metric: str) -> Outcomes | None:
        credits = self.models[model].credits
        if metric in credits:
            return outcomes_of(credits[metric])
        if metric in self.groups:
            parts = [self._outcomes(model, each) for each in self.groups[metric].members]
            known = [part for part in parts if part is not None]
            return pooled(known, by_size=self.groups[metric].by_size) if known and len(known) == len(parts) else None
        task, _, rest = metric.partition("/")
        level, _, kind = rest.partition("/")
        whole = f"{task}/{level}"
        if whole in credits and any(kind in ids for ids in self.instructions.get(task, ())):
            return outcomes_of(only_type(credits[whole], self.instructions[task], kind))
        return None

    def differences(self, *, seed: int = 0) -> dict[str, dict[str, Interval]]:
        """Model to metric to score minus the reference's, with paired bootstrap intervals; {} without a reference."""
        if self.reference is None:
            return {}
        found: dict[str, dict[str, Interval]] = {name: {} for name in self.models if name != self.reference}
        together: dict[tuple[object, ...], list[str]] = {}  # metrics of the same documents
        for metric in self.models[self.reference].scores:
            outcomes = [self._outcomes(name, metric) for name in self.models]
            if (own := outcomes[0]) is not None and all(each is not None for each in outcomes):
                documents = (metric.partition("/")[0], own.sizes)
                together.setdefault(documents, []).append(metric)
        for metrics in together.values():
            self._task_differences(metrics, found, seed)
        return found

    def _task_differences(self, metrics: list[str], found: dict[str, dict[str, Interval]], seed: int) -> None:
        """All metrics of a task in one bootstrap: the draws of documents cost more than the sums."""
        assert self.reference is not None
        names = [self.reference, *found]
        table = [self.outcomes(name, metric) for name in names for metric in metrics]
        draws = bootstrap_scores(table, seed=seed).reshape(len(names), len(metrics), -1)
        values = np.array([mean_score(each) for each in table]).reshape(len(names), len(metrics))
        for row, name in enumerate(names[1:], start=1):
            for column, metric in enumerate(metrics):
                value = float(values[row, column] - values[0, column])
                found[name][metric] = percentile_interval(value, draws[row, column] - draws[0, column])

    def retention(self, *, seed: int = 0) -> dict[str, Retention]:
        """Retention of every skill for every model but the base; {} without skills or a base."""
        if self.base is None or not self.skills:
            return {}
        return {name: self._retention(name, self.base, seed) for name in self.models if name != self.base}

    def _retention(self, name: str, base: str, seed: int) -> Retention:
        skills = {
            skill: SkillOutcomes(
                documents=each.metric.split("/")[0],
                base=self.outcomes(base, each.metric),
                expert=self.outcomes(each.expert, each.metric),
                merged=self.outcomes(name, each.metric),
            )
            for skill, each in self.skills.items()
        }
        return retention(skills, seed=seed)

    def flags(self) -> list[str]:
        """Sentences on what makes the numbers doubtful: a score of 0 where the base and another model have one, which
        usually means a broken template or parser; models run with different chat templates; prompts that were cut."""
        found = []
        also = "" if self.base is None else ", the base too,"
        for name, result in self.models.items():
            for task, metrics in self._silent(name).items():
                found.append(
                    f"{name}: {task} is 0 ({', '.join(metrics)}) where other models{also} are above 0; "
                    "check chat template and parser"
                )
            if result.truncated:
                found.append(f"{name}: {result.truncated} prompts were cut from the left to fit the model's window")
        if len({result.chat_template for result in self.models.values()}) > 1:
            found.append("the models were run with different chat templates")
        if len({result.batch_size for result in self.models.values()}) > 1:
            found.append("the models were run at different batch sizes, which changes roundings and so a few responses")
        return found

    def _silent(self, name: str) -> dict[str, list[str]]:
        """Task to the metrics by which a model has 0 where at least two others, the base among them, have more; without
        those of single instruction types, and without a group's tasks where the group is in it."""
        zero = [metric for metric, score in self.models[name].scores.items() if score.value == 0]
        found = [metric for metric in zero if metric.count("/") == 1 and self._others_above_zero(metric)]
        covered = {member for metric in found if metric in self.groups for member in self.groups[metric].members}
        tasks: dict[str, list[str]] = {}
        for task, _, metric in (each.partition("/") for each in found if each not in covered):
            tasks.setdefault(task, []).append(metric)
        return tasks

    def _others_above_zero(self, metric: str) -> bool:
        above = [
            name for name, result in self.models.items() if metric in result.scores and result.scores[metric].value > 0
        ]
        return len(above) > 1 and (self.base is None or self.base in above)


def outcomes_of(credits: Sequence[Sequence[float]]) -> Outcomes:
    """Sums and counts of documents × trials."""
    return Outcomes(
        successes=np.array([float(sum(each)) for each in credits]),
        trials=np.array([float(len(each)) for each in credits]),
    )


def only_type(
    credits: Sequence[Sequence[float]], instructions: Sequence[Sequence[str]], kind: str
) -> list[list[float]]:
    """Credits of one instruction type; documents without it have no trial."""
    return [
        [credit for credit, each in zip(row, ids, strict=True) if each == kind]
        for row, ids in zip(credits, instructions, strict=True)
    ]


def score_of(credits: Sequence[Sequence[float]]) -> Score:
    """Score of documents × trials."""
    outcomes = outcomes_of(credits)
    judged = int((outcomes.trials > 0).sum())
    return Score(value=mean_score(outcomes), stderr=standard_error(outcomes), n=judged)


def to_json(evaluation: Evaluation) -> str:
    """The artifact's JSON; derived numbers are written too, for readers, and not read back. NaN becomes null."""
    derived = {
        "differences": {
            name: {metric: asdict(each) for metric, each in row.items()}
            for name, row in evaluation.differences().items()
        },
        "retention": {name: asdict(each) for name, each in evaluation.retention().items()},
        "flags": evaluation.flags(),
    }
    whole = finite({"schema": SCHEMA, "kind": "evaluation", **asdict(evaluation), "derived": derived})
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in whole.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"  # a line a field: outcomes would take a line each with indentation


def load_evaluation(path: Path) -> Evaluation:
    """Read an artifact directory, or its evaluation.json.

    Raises:
        EvaluationError: the file is missing, damaged, or of another schema version.
    """
    file = path / FILE if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["kind"] != "evaluation" or found["schema"] != SCHEMA:
            raise EvaluationError(
                "an evaluation is of another version",
                where=file,
                got=f"{found['kind']} schema {found['schema']}",
                expected=f"evaluation schema {SCHEMA}",
                mend="read it with the wpmerge that wrote it, or evaluate again",
            )
        fields = {name: found[name] for name in Evaluation.__dataclass_fields__ if name != "groups"}
        fields["models"] = {name: result_from_json(each) for name, each in found["models"].items()}
        fields["skills"] = {name: Skill(**each) for name, each in found["skills"].items()}
        groups = found.get("groups", {})  # files of evaluations without a group may lack it
        fields["groups"] = {name: GroupMetric(**each) for name, each in groups.items()}
        return Evaluation(**fields)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise EvaluationError(
            "an evaluation cannot be read", where=file, got=f"{type(error).__name__}: {error}"
        ) from error


def result_from_json(found: Mapping[str, Any]) -> ModelResult:
    """A model's result as ``asdict`` wrote it."""
    scores = {
        metric: Score(value=_or_nan(each["value"]), stderr=_or_nan(each["stderr"]), n=each["n"])
        for metric, each in found["scores"].items()
    }
    return replace(ModelResult(**found), scores=scores)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
