"""Which lm-eval tasks are run, and where their documents come from: the hub's data sets or local JSONL files.

A local file stands in for a task's data set, or makes a task of its own when its name is not one of lm-eval's: rows
with IFEval's fields are judged by IFEval's checkers and those that the user names, rows of ``{"prompt", "answer"}`` by
the answer.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from wpmerge.errors import EvaluationError, reason_of
from wpmerge.ifeval import ensure_punkt, ifeval_checkers, require_punkt
from wpmerge.taskdata import check_readable, file_hash, local_config, unreadable

PRESETS: Mapping[str, tuple[str, ...]] = {
    "ifeval": ("ifeval",),
    "instruct": ("ifeval",),  # and every local file given with it
    "full": ("ifeval", "gsm8k", "minerva_math", "humaneval_instruct", "mbpp_instruct", "mmlu"),
}
"""Preset name to lm-eval task names; ``instruct`` adds the tasks that local files make. Of HumanEval and MBPP
the forms for chat models, and of MATH the one whose answer is parsed: by the plain ones a reply that says more may
score 0."""

TaskData: TypeAlias = Path | Mapping[str, Path]
"""A JSONL file for the split that is evaluated, or a file for each split the task reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSuite:
    """Loaded tasks, documents included, before any model is.

    Attributes:
        names: what was asked for, presets expanded.
        loaded: lm-eval's Task and Group objects, for ``simple_evaluate(tasks=...)``.
        leaves: task name to lm-eval Task, groups opened.
        groups: group name to lm-eval Group, those inside other groups too.
        manager: the lm-eval TaskManager that made them.
        sources: task name to ``{split: {"file", "sha256"}}`` for local data; hub tasks are absent.
    """

    names: tuple[str, ...]
    loaded: tuple[Any, ...]
    leaves: Mapping[str, Any]
    groups: Mapping[str, Any]
    manager: Any
    sources: Mapping[str, Mapping[str, Mapping[str, str]]]


def load_tasks(
    tasks: Sequence[str], *, task_data: Mapping[str, TaskData] | None = None, unsafe_code: bool = False
) -> TaskSuite:
    """Load tasks and their documents.

    Args:
        tasks: lm-eval task or group names, preset names, names of local files.
        task_data: task name to its local documents; those tasks need no network and leave no cache behind.
        unsafe_code: allow tasks that run code which the model wrote, on this machine.

    Raises:
        EvaluationError: an unknown task, documents that are not at hand or malformed, a task that runs code without
            ``unsafe_code``, an instruction type that cannot be judged here, a task asked for twice.
    """
    data = {
        name: dict(files) if isinstance(files, Mapping) else {"": Path(files)}
        for name, files in (task_data or {}).items()
    }
    names = expand_presets(tasks, data)
    if stray := sorted(set(data) - set(names)):
        raise EvaluationError(
            "data are given for a task that is not evaluated",
            got=", ".join(stray),
            expected=", ".join(names),
            mend="name the task among the tasks too",
        )
    ensure_punkt()
    ifeval_checkers()  # before lm-eval imports the module itself, without the guard
    if unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the code_eval metric asks for its own consent, by this variable
    with quiet():
        manager = _task_manager(names, data)
        loaded: list[Any] = []
        for name in names:
            task = _load_task(name, manager, data.get(name), unsafe_code=unsafe_code)
            loaded += task if isinstance(task, list) else [task]  # a tag is a list of tasks
        try:
            found = manager.load(loaded)
        except ValueError as error:  # a task alone and in a group, or in two groups
            raise EvaluationError(
                "a task is asked for twice",
                where=", ".join(names),
                got=error,
                mend="leave out the task, or the group that it is in",
            ) from error
    leaves: dict[str, Any] = found["tasks"]
    for name, task in leaves.items():
        _check_leaf(name, task, unsafe_code=unsafe_code)
        if name in data:
            check_readable(name, task, data[name])
    sources = {
        name: {split or "evaluated": {"file": str(path), "sha256": file_hash(path)} for split, path in files.items()}
        for name, files in data.items()
    }
    groups: dict[str, Any] = found.get("groups", {})
    return TaskSuite(names=names, loaded=tuple(loaded), leaves=leaves, groups=groups, manager=manager, sources=sources)


@functools.cache
def _description() -> str:
    from torch.utils.collect_env import get_env_info, pretty_str

    return str(pretty_str(get_env_info()))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's log lines and progress bars off stderr, its errors still show; describe the machine once, which
    lm-eval does for every model at a second each; and do not ask git about the user's directory."""
    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    tqdm = importlib.import_module("tqdm").tqdm
    machine: Any = importlib.import_module("torch.utils.collect_env")
    logger, original, describe = logging.getLogger("lm_eval"), tqdm.__init__, machine.get_pretty_env_info
    level, commit_hash = logger.level, evaluator.get_git_commit_hash

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    logger.setLevel(logging.ERROR)
    tqdm.__init__ = silent
    machine.get_pretty_env_info = _description
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        tqdm.__init__, machine.get_pretty_env_info = original, describe
        evaluator.get_git_commit_hash = commit_hash
        logger.setLevel(level)


def expand_presets(tasks: Sequence[str], data: Iterable[str] = ()) -> tuple[str, ...]:
    """Task names with presets opened, each once, in the order given.

    Raises:
        EvaluationError: no task at all.
    """
    names: list[str] = []
    for task in tasks:
        names += PRESETS.get(task, (task,))
        if task == "instruct":
            names += data
    if not names:
        raise EvaluationError("no task to evaluate", expected=f"a task name or a preset: {', '.join(PRESETS)}")
    return tuple(dict.fromkeys(names))


def instruct_alone(tasks: Iterable[str], data: Iterable[str]) -> bool:
    """Whether preset ``instruct`` is asked for and is IFEval alone: no local file is given for another task."""
    return "instruct" in tasks and not set(data) - set(PRESETS["ifeval"])


def _task_manager(names: Sequence[str], data: Iterable[str]) -> Any:
    """lm-eval's task index, read only where the named tasks lie if that is enough: the whole takes ten seconds."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    wanted = {*names, "ifeval"}  # the second gives local files of its form their configuration
    files = list(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"))
    folders = {path.parent for path in files if path.stem in wanted}
    manager = TaskManager(include_path=sorted(folders), include_defaults=False)
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None and name in data and not _is_named(name, files):
            continue  # a task that only the local file makes
        if entry is None or entry.kind.name != "TASK":
            return (
                _whole_index()
            )  # a group or tag may name tasks of other folders; an unknown name needs its neighbours
    return manager


@functools.cache
def _whole_index() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _is_named(name: str, files: Iterable[Path]) -> bool:
    """Whether a task, group or tag of lm-eval may have this name: a task's file is often named otherwise."""
    word = rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])"
    line = re.compile(rb"^[ \t]*(?:-|.*\b(?:task|group|tag)\b).*" + word, re.MULTILINE)
    return any(line.search(text) for path in files if name.encode() in (text := path.read_bytes()))


def _load_task(name: str, manager: Any, files: Mapping[str, Path] | None, *, unsafe_code: bool) -> Any:
    """One lm-eval Task or Group with its documents, or a tag's list of tasks."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index.get(name)
    if entry is None and files is None:
        near = difflib.get_close_matches(name, {*manager.all_tasks, *PRESETS}, n=5)
        raise EvaluationError(
            "unknown task",
            got=name,
            expected=f"one of lm-eval's tasks{'; near: ' + ', '.join(near) if near else ''}",
            mend="lm-eval ls tasks lists them all; a local file makes a task of its own through task data",
        )
    single = entry is not None and entry.kind.name == "TASK"
    if files is not None and entry is not None and not single:
        raise _not_one_task(name, entry, manager.task_index)
    runs_code = single and bool(load_yaml(entry.yaml_path, resolve_func=False).get("unsafe_code"))
    if runs_code and not unsafe_code:
        raise _runs_code(name)
    try:
        if files is None:
            return manager._load_spec(name)
        ifeval = load_yaml(manager.task_index["ifeval"].yaml_path, resolve_func=True)
        config = load_yaml(entry.yaml_path, resolve_func=True) if single else None
        return manager._load_spec(local_config(name, config, ifeval, files))
    except EvaluationError:
        raise
    except Exception as error:  # whatever a task's own code, its templates or the hub raise
        raise _not_loaded(name, error, files, runs_code=runs_code) from error


def _not_one_task(name: str, entry: Any, index: Mapping[str, Any]) -> EvaluationError:
    kind = entry.kind.name.lower().replace("py_task", "task written in Python")
    members = _members(name, index)
    return EvaluationError(
        "local documents can stand in for one task of a file, not for a group of tasks",
        where=name,
        got=f"{name} is a {kind} of lm-eval's{': ' + _first_few(members) if members else ''}",
        mend="give them for the group's tasks by name, or give a task of your own another name",
    )


def _members(name: str, index: Mapping[str, Any]) -> list[str]:
    """The tasks of a group or tag, by name; those that it defines itself are left out."""
    entry = index.get(name)
    if entry is None or entry.kind.name not in ("GROUP", "TAG"):
        return [] if entry is None else [name]
    given = sorted(entry.tags) if entry.kind.name == "TAG" else entry.cfg.get("task") or []
    names = [each if isinstance(each, str) else each.get("group", each.get("task")) for each in given]
    return [leaf for each in names for leaf in _members(str(each), index)]


def _first_few(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _not_loaded(name: str, error: Exception, files: Mapping[str, Path] | None, *, runs_code: bool) -> EvaluationError:
    """What to say when lm-eval cannot load a task."""
    reason = reason_of(error)
    if isinstance(error, ImportError):
        return EvaluationError(
            "a task needs a package that is not installed",
            where=name,
            got=error,
            mend="install it, or leave the task out",
        )
    if runs_code and not _code_eval_at_hand():
        return EvaluationError(
            "the program that judges code is not at hand: lm-eval downloads it, hf evaluate's code_eval, when it loads "
            "such a task, wherever the documents come from",
            where=name,
            got=reason,
            mend="load the task once with the network on this machine, which keeps it in the hub's cache",
        )
    if files is not None:
        return unreadable(name, ", ".join(map(str, files.values())), error)
    return EvaluationError(
        "the documents of a task are not at hand",
        where=name,
        got=reason,
        expected="its data set on the hub or in the hub's cache, or a local file",
        mend=f"give the documents as a JSONL file (--task-data {name}=FILE), or allow the network",
    )


def _code_eval_at_hand() -> bool:
    try:
        importlib.import_module("evaluate").load("code_eval")
    except Exception:  # not installed, not found, no network, no consent: one sentence for all of them
        return False
    return True


def _check_leaf(name: str, task: Any, *, unsafe_code: bool) -> None:
    """What can only be asked of a loaded task: does it run code, can its instruction types be judged."""
    if getattr(task, "UNSAFE_CODE", False) and not unsafe_code:
        raise _runs_code(name)
    documents = task.eval_docs
    if "instruction_id_list" in (getattr(documents, "features", None) or {}):
        require_punkt({each for ids in documents["instruction_id_list"] for each in ids}, where=name)


def _runs_code(name: str) -> EvaluationError:
    return EvaluationError(
        "this task runs code that the model wrote, on this machine",
        where=name,
        expected="consent",
        mend="run it where that is safe and say so with --confirm-unsafe-code",
    )
