"""Evaluate several models on the same tasks with lm-eval; finished models survive an interruption."""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wpmerge.checkers import Checkers, registered
from wpmerge.errors import EvaluationError, OutputError
from wpmerge.evaluation import (
    FILE,
    Evaluation,
    GroupMetric,
    ModelResult,
    Score,
    Skill,
    only_type,
    result_from_json,
    score_of,
    to_json,
)
from wpmerge.harness import (
    HarnessSettings,
    InMemory,
    Model,
    ModelRun,
    Progress,
    check_weights,
    model_identity,
    open_source,
    run_model,
)
from wpmerge.output import FULL, check_output, output_directory, write_file
from wpmerge.tasks import TaskData, TaskSuite, instruct_alone, load_tasks

_ATTEMPTS = 100  # to take the lock of a run that is just ending
_LONGEST_NAME = 100  # bytes of a file name that a model's or a task's name may take: two of them stand in one
_NAMING_FILES = ("tokenizer", "peft", "delta", "lora_local_path")  # arguments of models that name what is read
_PACKAGES = ("wpmerge", "lm_eval", "torch", "transformers", "datasets", "nltk", "langdetect")


def say_on_stderr(message: str) -> None:
    """Print a message for a person."""
    print(message, file=sys.stderr)


def evaluate(
    models: Mapping[str, Model],
    *,
    out: Path | None,
    tasks: Sequence[str] = ("ifeval",),
    task_data: Mapping[str, TaskData] | None = None,
    checkers: Sequence[Checkers] = (),
    reference: str | None = None,
    base: str | None = None,
    skills: Mapping[str, Skill] | None = None,
    settings: HarnessSettings | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] = say_on_stderr,
) -> Evaluation:
    """Run lm-eval on every model and gather scores and outcomes.

    Each finished model, and each finished request of the one in work, is kept in a folder beside ``out`` until
    ``out`` is written whole; a rerun with the same models, tasks and settings goes on from there.

    Args:
        models: name to model, in the order to run; see :data:`wpmerge.harness.Model`.
        out: directory for evaluation.json and lm-eval's own results; None writes nothing.
        tasks: lm-eval task names or presets.
        task_data: task name to its local documents.
        checkers: of instructions in local documents that IFEval does not have, in its registry meanwhile; a model that
            was finished with others is judged again.
        reference: the model that differences are taken to; None is the base.
        base: the model that retention starts from; None is the reference.
        skills: skill name to its expert and metric, for retention.
        settings: how every model is run.
        overwrite: replace an evaluation that is already at ``out``; never what is read for this one.
        progress: called with model name, finished requests, all requests.
        say: takes one-sentence messages.

    Raises:
        EvaluationError: see :func:`wpmerge.tasks.load_tasks`, :func:`wpmerge.harness.check_weights` and
            :func:`wpmerge.harness.run_model`; an unknown name among ``reference``, ``base`` and ``skills``, or a skill
            whose task is not evaluated or has no such metric; models judged on different documents.
        CheckpointError: a model is neither a directory nor obtainable from the hub.
        OutputError: ``out`` cannot be written, is, holds or lies in what is read, or another run is writing it; the
            disk is full.
    """
    start = time.monotonic()
    settings, skills = settings or HarnessSettings(), dict(skills or {})
    reference, base = reference or base, base or reference
    _check_names(models, reference, base, skills)
    sources = {name: open_source(name, model, settings) for name, model in models.items()}
    _check_tokenizers(sources, settings)
    inputs = _inputs(sources, settings, task_data or {}, checkers)
    if out is not None:
        check_output(out, inputs=inputs, overwrite=overwrite)
    for name, model in sources.items():
        check_weights(name, model, settings)
    if instruct_alone(tasks, task_data or {}):
        say("preset instruct holds IFEval alone: no local file of other instructions is given (--task-data NAME=FILE)")
    own = [each.fingerprint() for each in checkers]
    with registered(checkers), _work_folder(out) as work, _disk(out, work):
        suite = load_tasks(tasks, task_data=task_data, unsafe_code=settings.unsafe_code)
        check_skills(skills, suite)
        data_hash = {name: _documents_hash(task) for name, task in suite.leaves.items()}
        judged = {"data": data_hash, **({"checkers": own} if own else {})}
        if out is not None:
            check_output(out, inputs=inputs, overwrite=overwrite)  # again: an earlier run may just have ended
        finished, kept = {}, list[Path]()
        for name, model in sources.items():
            counted = None if progress is None else _named(progress, name)
            finished[name], files = _one_model(name, model, suite, settings, judged, work, say, counted)
            kept += files
        evaluation = Evaluation(
            models={name: result_from_json(each["result"]) for name, each in finished.items()},
            documents=_same(finished, "documents"),
            instructions=_same(finished, "instructions"),
            reference=reference,
            base=base,
            skills=skills,
            groups={name: GroupMetric(**each) for name, each in _same(finished, "groups").items()},
            settings={**asdict(settings), "tasks": list(suite.names)},
            provenance={
                "versions": versions(),
                "task_data": {name: dict(files) for name, files in suite.sources.items()},
                "documents_sha256": data_hash,
                "checkers": own,
                "task_versions": {name: str(task.VERSION) for name, task in suite.leaves.items()},
                "seconds": round(time.monotonic() - start, 3),
            },
        )
        for skill in skills.values():
            evaluation.outcomes(skill.expert, skill.metric)  # refuses one without a number per document
        if out is not None:
            _write(evaluation, finished, out, inputs=inputs, overwrite=overwrite)
        for file in kept:
            file.unlink(missing_ok=True)
    for flag in evaluation.flags():
        say(flag)
    return evaluation


def versions() -> dict[str, str]:
    """Versions of the packages that decide a score."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _inputs(
    sources: Mapping[str, Model],
    settings: HarnessSettings,
    task_data: Mapping[str, TaskData],
    checkers: Sequence[Checkers],
) -> list[Path]:
    """The directories and files that an evaluation reads: no output may take the place of one."""
    named = [str(settings.model_args[each]) for each in _NAMING_FILES if settings.model_args.get(each)]
    named += [model for model in sources.values() if isinstance(model, str)]
    found = [Path(each) for each in named if os.path.lexists(each)]  # the rest are hub ids
    for model in sources.values():
        if isinstance(model, InMemory):
            found += model.inputs
        elif isinstance(model, Path):
            found.append(model)
    for files in task_data.values():
        found += files.values() if isinstance(files, Mapping) else [files]
    return found + [each.file.parent / name for each in checkers for name in each.files]


def _check_tokenizers(sources: Mapping[str, Model], settings: HarnessSettings) -> None:
    """Refuse a tokenizer for models that come with one; lm-eval would be given two."""
    loaded = [name for name, model in sources.items() if not isinstance(model, str | Path)]
    if loaded and "tokenizer" in settings.model_args:
        raise EvaluationError(
            "--model-arg names a tokenizer, and a model that is made in memory brings its own",
            where=loaded[0],
            got=f"tokenizer={settings.model_args['tokenizer']}",
            mend="evaluate it apart, or write the merge with wpmerge fuse and evaluate that",
        )


@contextmanager
def _disk(out: Path | None, work: Path) -> Iterator[None]:
    """Say that the disk is full, and what is left of the work.

    Raises:
        OutputError: it is.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if not _is_full(error):
            raise
        kept = "the same command then goes on from the models and requests that are finished, which are kept"
        raise OutputError(
            "the disk is full, or cannot be written",
            where=getattr(error, "filename", None) or work,
            got=getattr(error, "strerror", None) or error,
            expected="room for the replies and results of every model",
            mend=f"free some space; {kept}" if out is not None else "free some space, or set TMPDIR to a larger disk",
        ) from error


def _is_full(error: OSError | sqlite3.Error) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest of it says in which call
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def _check_names(
    models: Mapping[str, Model], reference: str | None, base: str | None, skills: Mapping[str, Skill]
) -> None:
    if not models:
        raise EvaluationError("no model to evaluate")
    for name in [reference, base, *(skill.expert for skill in skills.values())]:
        if name is not None and name not in models:
            raise EvaluationError("no such model in the evaluation", got=name, expected=", ".join(models))


def check_skills(skills: Mapping[str, Skill], suite: TaskSuite) -> None:
    """Refuse a skill of a task that is not evaluated, or of a metric that it has not, before any model is run."""
    metrics = _metrics(suite)
    for skill in skills.values():
        task, slash, _ = skill.metric.partition("/")
        if task not in {*suite.leaves, *suite.groups} or not slash:
            known = [*suite.groups, *suite.leaves]
            near = difflib.get_close_matches(task, known, n=3) or known[:10]
            raise EvaluationError(
                "a skill's metric is of no evaluated task",
                got=skill.metric,
                expected=f"TASK/METRIC with TASK one of {', '.join(near)}",
            )
        known = metrics[task]
        whole = "/".join(skill.metric.split("/")[:2])  # IFEval's may end in an instruction's id
        if known and skill.metric not in known and whole not in known:
            near = difflib.get_close_matches(whole, known, n=3) or known[:10]
            raise EvaluationError("a skill's metric is none of its task", got=skill.metric, expected=", ".join(near))


def _metrics(suite: TaskSuite) -> dict[str, list[str]]:
    """Task or group → its metrics as an evaluation names them, as far as lm-eval's task declares any."""
    found = {name: _metric_names(name, _declared(task), _filters(task)) for name, task in suite.leaves.items()}
    for name, group in suite.groups.items():
        aggregated = [each.metric for each in group.aggregate_metric_list or ()]
        filters = [each for task in group.get_all_tasks() for each in _filters(task)]
        found[name] = _metric_names(name, aggregated, filters)
    return found


def _declared(task: Any) -> list[str]:
    """A task's metrics: of HumanEval's function, which gives pass@k for each k that it is given, these."""
    names = list(task.aggregation())
    for each in getattr(task.config, "metric_list", None) or ():
        if callable(each.get("metric")) and "k" in each:
            ks = each["k"] if isinstance(each["k"], list) else [each["k"]]
            names = [name for name in names if name != each["metric"].__name__] + [f"pass@{k}" for k in ks]
    return names


def _metric_names(task: str, metrics: Iterable[str], filters: Sequence[str]) -> list[str]:
    ends = ["" if each == "none" else f",{each}" for each in dict.fromkeys(filters)]
    return [f"{task}/{metric}{end}" for metric in metrics for end in ends]


def _filters(task: Any) -> list[str]:
    return [each.name for each in getattr(task, "_filters", ())] or ["none"]


def _named(progress: Callable[[str, int, int], None], name: str) -> Progress:
    return lambda done, total: progress(name, done, total)


@contextmanager
def _work_folder(out: Path | None) -> Iterator[Path]:
    """Where finished models wait: beside ``out``, one run at a time, kept while anything is in it; a temporary one
    without ``out``.

    Raises:
        OutputError: it cannot be made, or another run is at work there.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="wpmerge-eval-") as folder:
            yield Path(folder)
        return
    work = out.absolute().with_name(f".{out.name}.models")
    with _locked(work, out) as lock:
        try:
            yield work
        finally:
            lock.unlink(missing_ok=True)
            with suppress(OSError):  # somebody's records are left
                work.rmdir()


@contextmanager
def _locked(work: Path, out: Path) -> Iterator[Path]:
    """The folder with a lock file in it that this run alone holds; released when the process ends, however it does."""
    path = work / "lock"
    for _ in range(_ATTEMPTS):  # the one before may end, and remove folder and lock, between any two steps
        try:
            work.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise OutputError("cannot write beside the output path", where=out, got=error.strerror) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                break
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                yield path
                return
    raise OutputError("another run is writing this output", where=out, mend="wait for it, or choose another path")


def _one_model(
    name: str,
    model: Model,
    suite: TaskSuite,
    settings: HarnessSettings,
    judged: Mapping[str, Any],
    work: Path,
    say: Callable[[str], None],
    progress: Progress | None,
) -> tuple[dict[str, Any], tuple[Path, Path]]:
    """A finished model's record, from the work folder or by running it, and the files that keep it and what it said."""
    start = time.monotonic()
    model, identity = model_identity(name, model, settings)
    parts = {"model": identity, **judged, "settings": asdict(settings), "versions": versions()}
    record = work / f"{file_name(name)}-{_key(parts)}.json"
    said = {name: part for name, part in parts.items() if name != "checkers"}  # what a model says, whoever judges it
    cache = work / f"{file_name(name)}-{_key(said)}.requests"
    if record.is_file():
        say(f"{name}: finished in an earlier run")
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return found, (record, cache)
    if cache.is_file():
        say(f"{name}: going on with the requests that an earlier run finished")
    run = run_model(name, model, suite, settings, cache=cache, say=say, progress=progress)
    found = _record(model, run, suite, time.monotonic() - start)
    write_file(record, json.dumps(found, default=_plain))
    if "checkers" not in judged:  # these may be mended before all models are finished
        cache.unlink(missing_ok=True)
    return found, (record, cache)


def _key(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _record(model: Model, run: ModelRun, suite: TaskSuite, seconds: float) -> dict[str, Any]:
    """What is kept of a finished model: its result, what it was judged on, lm-eval's own output."""
    credits: dict[str, list[list[float]]] = {}
    scores: dict[str, Score] = {}
    documents: dict[str, list[str]] = {}
    instructions: dict[str, list[list[str]]] = {}
    for task, logged in run.samples.items():
        first = [sample for sample in logged if sample["filter"] == logged[0]["filter"]]
        documents[task] = [sample["doc_hash"] for sample in first]
        if "instruction_id_list" in first[0]["doc"]:
            instructions[task] = [list(sample["doc"]["instruction_id_list"]) for sample in first]
        credits |= {f"{task}/{metric}": rows for metric, rows in _credits(logged).items()}
    for task, row in run.results["results"].items():
        scores |= _scores(task, row, credits, instructions.get(task), run.results["n-samples"])
    means = {name: rows for name, rows in credits.items() if name not in scores or _is_mean(rows, scores[name].value)}
    result = ModelResult(
        source=str(model) if isinstance(model, str | Path) else "in memory",
        chat_template=run.chat_template,
        batch_size=run.batch_size,
        truncated=run.truncated,
        seconds=round(seconds, 3),
        scores=scores,
        credits=means,
    )
    lm_eval = {"results": run.results, "samples": run.samples}
    return {
        "result": asdict(result),
        "documents": documents,
        "instructions": instructions,
        "groups": _groups(suite, scores),
        "lm_eval": lm_eval,
    }


def _groups(suite: TaskSuite, scores: Mapping[str, Score]) -> dict[str, Any]:
    """Each group's metrics: the tasks' that lm-eval aggregates, and whether by size."""
    found: dict[str, Any] = {}
    for name, group in suite.groups.items():
        by_size = {each.metric: each.weight_by_size for each in group.aggregate_metric_list or ()}
        for metric in (each.removeprefix(f"{name}/") for each in scores if each.startswith(f"{name}/")):
            members = [f"{task.task_name}/{metric}" for task in group.get_all_tasks()]
            weight = by_size.get(metric.partition(",")[0])
            if weight is not None:
                own = [each for each in members if each in scores]
                found[f"{name}/{metric}"] = {"members": own, "by_size": bool(weight)}
    return found


def _credits(logged: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Metric to documents × trials; metrics whose value per document is no number, nor a list of them, are left out."""
    rows: dict[str, list[list[float]]] = {}
    unfit = set()
    for sample in logged:
        for metric in sample["metrics"]:
            value = sample[metric]
            name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            trials = value if isinstance(value, list) else [value]
            if all(isinstance(each, int | float) and math.isfinite(each) for each in trials):
                rows.setdefault(name, []).append([int(each) if int(each) == each else float(each) for each in trials])
            else:
                unfit.add(name)
    return {name: row for name, row in rows.items() if name not in unfit}


def _scores(
    task: str,
    row: Mapping[str, Any],
    credits: Mapping[str, list[list[float]]],
    instructions: list[list[str]] | None,
    counts: Mapping[str, Any],
) -> dict[str, Score]:
    """Scores of one row of lm-eval's results; per instruction type too, where documents name them."""
    scores: dict[str, Score] = {}
    for key, value in row.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = f"{task}/{metric}" if kind == "none" else f"{task}/{metric},{kind}"
        stderr = row.get(f"{metric}_stderr,{kind}")
        known = float(stderr) if isinstance(stderr, int | float) else float("nan")
        n = int(counts.get(task, {}).get("effective", row.get("sample_len", 0)))
        scores[name] = Score(value=float(value), stderr=known, n=n)
        if name in credits:
            own, mean = score_of(credits[name]), _is_mean(credits[name], float(value))
            scores[name] = Score(value=float(value), stderr=own.stderr if mean else known, n=own.n)
            if instructions is not None and metric.startswith("inst_level"):
                for each in sorted({each for ids in instructions for each in ids}):
                    scores[f"{name}/{each}"] = score_of(only_type(credits[name], instructions, each))
    return scores


def _is_mean(credits: Sequence[Sequence[float]], value: float) -> bool:
    """Whether lm-eval's value is the credits' mean; a perplexity, say, is not that of its log-likelihoods."""
    return abs(score_of(credits).value - value) < 1e-9


def _same(finished: Mapping[str, Mapping[str, Any]], part: str) -> dict[str, Any]:
    """The part that all models must share, or there is nothing to pair."""
    (first, own), *others = ((name, each[part]) for name, each in finished.items())
    for name, other in others:
        if other != own:
            raise EvaluationError("two models were judged on different documents", got=f"{first} and {name}")
    return dict(own)


def _write(
    evaluation: Evaluation,
    finished: Mapping[str, Mapping[str, Any]],
    out: Path,
    *,
    inputs: Sequence[Path],
    overwrite: bool,
) -> None:
    """evaluation.json, and lm-eval's results and samples of each model, under the final name when whole."""
    with output_directory(out, inputs=inputs, overwrite=overwrite) as staging, _disk(out, staging):
        folder = staging / "lm_eval"
        folder.mkdir()
        for name, record in finished.items():
            own = record["lm_eval"]
            write_file(folder / f"{file_name(name)}.json", json.dumps(own["results"], indent=1, default=_plain))
            for task, samples in own["samples"].items():
                lines = [json.dumps(sample, ensure_ascii=False, default=_plain) for sample in samples]
                write_file(folder / f"{file_name(name)}.{file_name(task)}.jsonl", "\n".join(lines) + "\n")
        write_file(staging / FILE, to_json(evaluation))


def file_name(name: str) -> str:
    """A model's or task's name as a file name, at most 100 bytes; names that differ stay different."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip(".") or "_"
    if len(plain.encode()) > _LONGEST_NAME:
        plain = plain.encode()[: _LONGEST_NAME - 9].decode(errors="ignore")
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _plain(value: Any) -> Any:
    from lm_eval.utils import handle_non_serializable

    return handle_non_serializable(value)


def _documents_hash(task: Any) -> str:
    """SHA-256 of a task's evaluated documents, in order."""
    digest = hashlib.sha256()
    for document in task.eval_docs:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()
