"""A whole run: score, fuse, evaluate, report, each skipped where it is done: the work behind ``wpmerge run``.

What is done, and with what, is known by :mod:`wpmerge.run_record`.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wpmerge import api, options
from wpmerge.capability import Capability, load_capability
from wpmerge.console import Report
from wpmerge.directory import locate
from wpmerge.errors import RecipeError
from wpmerge.evaluating import check_skills
from wpmerge.evaluation import Skill
from wpmerge.plan import BASE
from wpmerge.report import write_report
from wpmerge.report_inputs import read_material
from wpmerge.rules import given_scales
from wpmerge.run_recipe import EVALUATED, MERGED, Judging, RunRecipe, settings_of
from wpmerge.run_record import (
    Stage,
    check_directory,
    check_own,
    files_of,
    locked,
    make_stage,
    read_record,
    refusal,
    state_of,
    write_record,
)
from wpmerge.scoring import check_names
from wpmerge.sources import Source, find_source, identity
from wpmerge.taskdata import file_hash
from wpmerge.tasks import load_tasks

PAGE = "report.html"
ELSEWHERE = ("max_memory", "threads", "directory")
"""Settings that change where and how fast a result comes, not what it is; device and streaming are of these too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A stage that is done: its output, whether it was before, and the seconds it took when it was run."""

    name: str
    output: Path
    before: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A recipe with what the command line adds to it.

    Attributes:
        recipe: what is asked for.
        out: the directory of the run.
        places: each model, by name, "base" for the base: the recipe's, or where it lives now.
        capabilities: by name, retain sets among them.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.
        unsafe_code: tasks may run code that a model wrote.
        progress: told what is being done.
    """

    recipe: RunRecipe
    out: Path
    places: Mapping[str, str]
    capabilities: Mapping[str, Capability]
    trust_remote_code: bool = False
    unsafe_code: bool = False
    progress: Report | None = None


def prepare(
    recipe: RunRecipe,
    *,
    out: Path | None = None,
    models: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    unsafe_code: bool = False,
    progress: Report | None = None,
) -> Run:
    """Check what can be checked before a model is opened.

    Args:
        recipe: what is asked for.
        out: another directory than the recipe's.
        models: where models live now, by name, "base" for the base.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.
        unsafe_code: tasks may run code that a model wrote.
        progress: told what is being done.

    Raises:
        WpmergeError: names, capabilities or local documents cannot be used, or the directory holds something else.
    """
    places = {BASE: recipe.base, **recipe.experts}
    if unknown := sorted(set(models or {}) - set(places)):
        raise RecipeError("the recipe has no such model", got=unknown[0], expected=", ".join(places))
    own = {name: load_capability(name, spec) for name, spec in recipe.capabilities.items()}
    retained = {name: load_capability(name, spec) for name, spec in recipe.retain.items()}
    check_names(recipe.experts, own, retained)
    _check_rule(recipe)
    if recipe.evaluation is not None:
        _check_judging(recipe.evaluation, recipe)
    directory = (out or Path(recipe.output.directory).expanduser()).absolute()
    check_directory(directory)
    return Run(
        recipe=recipe,
        out=directory,
        places={**places, **(models or {})},
        capabilities=own | retained,
        trust_remote_code=trust_remote_code,
        unsafe_code=unsafe_code,
        progress=progress,
    )


def sources_of(run: Run) -> dict[str, Source]:
    """What is at hand of every model, without a network; "base" for the base."""
    return {name: find_source(place, trust_remote_code=run.trust_remote_code) for name, place in run.places.items()}


def stages_of(run: Run, places: Mapping[str, Path | None]) -> list[Stage]:
    """The run's stages, in their order.

    Args:
        run: what is asked for.
        places: every model's directory; None where it is not at hand yet.
    """
    recipe = run.recipe
    models = {name: None if path is None else identity(path) for name, path in places.items()}
    prompts = {name: capability.content_hash() for name, capability in run.capabilities.items()}
    scoring = {
        "models": models,
        "capabilities": prompts,
        "retain": sorted(recipe.retain),
        "vocab": recipe.vocab,
        "scoring": settings_of(recipe.scoring, *ELSEWHERE),
    }
    score = make_stage("score", run.out / "scores", scoring, lambda overwrite: _score(run, overwrite), after=None)
    fusing = {"rule": settings_of(recipe.rule, *ELSEWHERE), "output": settings_of(recipe.output, *ELSEWHERE)}
    fuse = make_stage("fuse", run.out / MERGED, fusing, lambda overwrite: _fuse(run, overwrite), after=score)
    stages = [score, fuse]
    if (judging := recipe.evaluation) is not None:
        wanted = {"evaluation": settings_of(judging), "documents": _document_hashes(judging)}

        def evaluate(overwrite: bool) -> object:
            return _evaluate(run, judging, overwrite)

        stages.append(make_stage("eval", run.out / "evaluation", wanted, evaluate, after=fuse))
    shown = make_stage("report", run.out / PAGE, {}, lambda overwrite: _report(run, overwrite), after=stages[-1])
    return [*stages, shown]


def carry_out(run: Run, *, overwrite: bool = False) -> list[Finished]:
    """Do every stage that is not done.

    Args:
        run: what :func:`prepare` made.
        overwrite: replace outputs that were made with other settings.

    Raises:
        WpmergeError: of any stage; or a stage was done with other settings and ``overwrite`` is not given, or a file
            of the user's lies in what would be replaced. Nothing of what was there is gone then.
    """
    tell: Report = run.progress or (lambda *_: None)
    places: dict[str, Path | None] = {}
    for name, place in run.places.items():
        tell(f"finding {name}", 0, 1)
        places[name] = locate(place)
    stages = stages_of(run, places)
    with locked(run.out):
        record = read_record(run.out)
        states = {stage.name: state_of(stage, record) for stage in stages}
        changed = [stage for stage in stages if states[stage.name] == "changed"]
        costly = [stage for stage in changed if stage.name != "report"]  # a report is soon made again
        if costly and not overwrite:
            raise refusal(costly, record)
        for stage in changed:
            check_own(stage, record)
        if (judging := run.recipe.evaluation) is not None and states["eval"] != "done":
            _check_tasks(judging, run.unsafe_code)
        finished = []
        for stage in stages:
            before = states[stage.name] == "done"
            seconds = _do(stage, run, record, again=states[stage.name] == "changed") if not before else 0.0
            if before:
                tell(f"{stage.name}: done before, in {stage.output}", 0, 1)
            if record["stages"][stage.name].get("files") is None:
                _keep(stage, record, run, seconds)  # a run was killed between the output's name and the record
            finished.append(Finished(name=stage.name, output=stage.output, before=before, seconds=seconds))
    return finished


def _do(stage: Stage, run: Run, record: dict[str, Any], *, again: bool) -> float:
    """Run a stage, and record that it began, so that its output is known as ours once it appears, and that it ended."""
    replaced = stage.output.stat().st_ino if again else None
    before = record["stages"].get(stage.name)
    began = {"key": stage.key, "settings": stage.settings, "replaces": replaced, "files": None}
    there = (before or {}).get("replaced") or before  # what lies there, not a replacement that never ended
    record["stages"][stage.name] = began | ({"replaced": there} if again and there else {})
    write_record(run.out, run.recipe, record)
    started = time.monotonic()
    try:
        stage.work(again)
    except Exception:
        del record["stages"][stage.name]
        record["stages"] |= {} if before is None else {stage.name: before}
        write_record(run.out, run.recipe, record)
        raise
    seconds = round(time.monotonic() - started, 3)
    _keep(stage, record, run, seconds)
    return seconds


def _keep(stage: Stage, record: dict[str, Any], run: Run, seconds: float) -> None:
    kept = {"key": stage.key, "settings": stage.settings, "files": files_of(stage.output), "seconds": seconds}
    record["stages"][stage.name] = kept
    write_record(run.out, run.recipe, record)


def _score(run: Run, overwrite: bool) -> object:
    recipe = run.recipe
    return api.score(
        base=run.places[BASE],
        expert={name: run.places[name] for name in recipe.experts},
        capability=recipe.capabilities,
        retain=recipe.retain,
        out=run.out / "scores",
        vocab=recipe.vocab,
        device=recipe.device,
        stream=recipe.stream,
        overwrite=overwrite,
        trust_remote_code=run.trust_remote_code,
        progress=run.progress,
        **settings_of(recipe.scoring),
    )


def _fuse(run: Run, overwrite: bool) -> object:
    recipe = run.recipe
    return api.fuse(
        run.out / "scores",
        out=run.out / MERGED,
        rule=recipe.rule.name,
        model=run.places,
        device=recipe.device,
        stream=recipe.stream,
        overwrite=overwrite,
        trust_remote_code=run.trust_remote_code,
        progress=run.progress,
        **settings_of(recipe.rule, "name"),
        **settings_of(recipe.output, "directory"),
    )


def _evaluate(run: Run, judging: Judging, overwrite: bool) -> object:
    def tell(name: str, done: int, total: int) -> None:
        if run.progress is not None:
            run.progress(f"evaluating {name}", done, total)

    return api.evaluate(
        {**run.places, MERGED: run.out / MERGED},
        out=run.out / "evaluation",
        base=BASE,
        device=run.recipe.device,
        confirm_unsafe_code=run.unsafe_code,
        overwrite=overwrite,
        trust_remote_code=run.trust_remote_code,
        progress=tell,
        task_data=_task_data(judging),
        **settings_of(judging, "task_data"),
    )


def _task_data(judging: Judging) -> dict[str, str | dict[str, str]]:
    """Task → its file, or a file per split, as ``wpmerge eval`` takes them."""
    return {
        task: {"" if split == EVALUATED else split: file for split, file in files.items()}
        if isinstance(files, dict)
        else files
        for task, files in judging.task_data.items()
    }


def _report(run: Run, overwrite: bool) -> object:
    judged = None if run.recipe.evaluation is None else run.out / "evaluation"
    material = read_material(run.out / "scores", plan=run.out / MERGED, evaluation=judged)
    return write_report(material, out=run.out / PAGE, overwrite=overwrite)


def _check_rule(recipe: RunRecipe) -> None:
    """Refuse a rule or scales that cannot be meant, before hours of scoring."""
    settings, _ = api.fuse_settings(rule=recipe.rule.name, **settings_of(recipe.rule, "name", *ELSEWHERE))
    given_scales(settings, tuple(recipe.experts))
    if settings.rule == "joint" and not recipe.scoring.cross:
        raise RecipeError("rule joint needs cross effects", got="scoring.cross: false", mend="leave it out")


def _check_judging(judging: Judging, recipe: RunRecipe) -> None:
    """Refuse what no evaluation can be made of, before hours of scoring."""
    if unknown := [name for name in judging.skill if name not in recipe.experts]:
        raise RecipeError("evaluation.skill names no expert", got=unknown[0], expected=", ".join(recipe.experts))
    options.batch_size(str(judging.batch_size))
    for task, _, file in _document_files(judging):
        if not file.is_file():
            raise RecipeError(f"evaluation.task_data.{task} is no file", where=file, mend="check the path")


def _check_tasks(judging: Judging, unsafe_code: bool) -> None:
    """Refuse tasks that there are none of, whose documents are not to be had, and metrics that are none of theirs,
    before hours of scoring."""
    files = api.task_files(_task_data(judging))
    suite = load_tasks(api.task_names(judging.tasks), task_data=files, unsafe_code=unsafe_code)
    check_skills({name: Skill(expert=name, metric=metric) for name, metric in judging.skill.items()}, suite)


def _document_files(judging: Judging) -> Iterator[tuple[str, str, Path]]:
    """Task, split, file."""
    for task, files in judging.task_data.items():
        for split, file in files.items() if isinstance(files, dict) else [(EVALUATED, files)]:
            yield task, split, Path(file)


def _document_hashes(judging: Judging) -> dict[str, str]:
    return {f"{task}: {split}": file_hash(file) for task, split, file in _document_files(judging)}
