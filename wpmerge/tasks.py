"""Which lm-eval tasks are run, and where their documents come from: the hub's data sets or local JSONL files.

A local file stands in for a task's data set, or makes a task of its own when its name is not one of lm-eval's: rows
with IFEval's fields are judged by IFEval's checkers, rows of ``{"prompt", "answer"}`` by the answer.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from wpmerge.errors import EvaluationError
from wpmerge.ifeval import ensure_punkt, ifeval_checkers, require_punkt
from wpmerge.taskdata import (
    ANSWER_FIELDS,
    IFEVAL_FIELDS,
    check_fields,
    check_ifeval,
    file_hash,
    in_memory,
    judge_answer,
    read_rows,
)

PRESETS: Mapping[str, tuple[str, ...]] = {
    "ifeval": ("ifeval",),
    "instruct": ("ifeval",),  # and every local file given with it
    "full": ("ifeval", "gsm8k", "hendrycks_math", "humaneval", "mbpp", "mmlu"),
}
"""Preset name to lm-eval task names; ``instruct`` adds the tasks that local files make."""

TaskData: TypeAlias = Path | Mapping[str, Path]
"""A JSONL file for the split that is evaluated, or a file for each split the task reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSuite:
    """Loaded tasks, documents included, before any model is.

    Attributes:
        names: what was asked for, presets expanded.
        loaded: lm-eval's Task and Group objects, for ``simple_evaluate(tasks=...)``.
        leaves: task name to lm-eval Task, groups opened.
        manager: the lm-eval TaskManager that made them.
        sources: task name to ``{split: {"file", "sha256"}}`` for local data; hub tasks are absent.
    """

    names: tuple[str, ...]
    loaded: tuple[Any, ...]
    leaves: Mapping[str, Any]
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
            ``unsafe_code``, an instruction type that cannot be judged here.
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
        loaded = [_load_task(name, manager, data.get(name), unsafe_code=unsafe_code) for name in names]
        leaves: dict[str, Any] = manager.load(loaded)["tasks"]
    for name, task in leaves.items():
        _check_leaf(name, task, unsafe_code=unsafe_code)
    sources = {
        name: {split or "evaluated": {"file": str(path), "sha256": file_hash(path)} for split, path in files.items()}
        for name, files in data.items()
    }
    return TaskSuite(names=names, loaded=tuple(loaded), leaves=leaves, manager=manager, sources=sources)


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


def _task_manager(names: Sequence[str], data: Iterable[str]) -> Any:
    """lm-eval's task index, read only where the named tasks lie if that is enough: the whole takes seconds to parse."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    wanted = {*names, "ifeval"}  # the second gives local files of its form their configuration
    files = Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")
    folders = {path.parent for path in files if path.stem in wanted}
    manager = TaskManager(include_path=sorted(folders), include_defaults=False)
    for name in names:
        entry = manager.task_index.get(name)
        if entry.kind.name != "TASK" if entry is not None else name not in data:
            return TaskManager()  # a group or tag may name tasks of other folders; an unknown name needs its neighbours
    return manager


def _load_task(name: str, manager: Any, files: Mapping[str, Path] | None, *, unsafe_code: bool) -> Any:
    """One lm-eval Task or Group with its documents."""
    entry = manager.task_index.get(name)
    if entry is None and files is None:
        near = difflib.get_close_matches(name, {*manager.all_tasks, *PRESETS}, n=5)
        raise EvaluationError(
            "unknown task",
            got=name,
            expected=f"one of lm-eval's tasks{'; near: ' + ', '.join(near) if near else ''}",
            mend="lm-eval ls tasks lists them all; a local file makes a task of its own through task data",
        )
    config = _config(name, entry, manager, files)
    if config is not None and config.get("unsafe_code") and not unsafe_code:
        raise _runs_code(name)
    try:
        return manager._load_spec(name if files is None else config)
    except ImportError as error:
        raise EvaluationError(
            "a task needs a package that is not installed",
            where=name,
            got=error,
            mend="install it, or leave the task out",
        ) from error
    except (OSError, ValueError) as error:
        raise EvaluationError(
            "the documents of a task are not at hand",
            where=name,
            got=f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}",
            expected="its data set on the hub or in the hub's cache, or a local file",
            mend=f"give the documents as a JSONL file (--task-data {name}=FILE), or allow the network",
        ) from error


def _config(name: str, entry: Any, manager: Any, files: Mapping[str, Path] | None) -> dict[str, Any] | None:
    """A task's lm-eval configuration, its functions resolved only when the local files are to be put into it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if entry is not None and entry.kind.name != "TASK":
        if files is not None:
            raise EvaluationError(
                "local documents can stand in for one task, not for a group of tasks",
                where=name,
                got=entry.kind.name.lower(),
                mend="give them for the group's tasks by name",
            )
        return None
    if files is None:
        config: dict[str, Any] = load_yaml(entry.yaml_path, resolve_func=False)
        return config
    rows = {split: read_rows(path) for split, path in files.items()}
    if entry is not None:
        config = load_yaml(entry.yaml_path, resolve_func=True)
    else:
        config = _own_config(name, rows, files, load_yaml(manager.task_index["ifeval"].yaml_path, resolve_func=True))
    rows = _name_splits(name, config, rows, files)
    return {**config, "task": name, "custom_dataset": in_memory(rows), "dataset_name": None, "dataset_kwargs": None}


def _own_config(
    name: str, rows: Mapping[str, Sequence[Mapping[str, Any]]], files: Mapping[str, Path], ifeval: dict[str, Any]
) -> dict[str, Any]:
    """Configuration of a task that exists only as a local file, by the fields of its first row."""
    split, first = next((split, found[0]) for split, found in rows.items())
    if all(field in first for field in IFEVAL_FIELDS):
        return ifeval
    if all(field in first for field in ANSWER_FIELDS):
        return {
            "output_type": "generate_until",
            "test_split": "test",
            "num_fewshot": 0,
            "doc_to_text": "prompt",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 256},
            "process_results": judge_answer,
            "metric_list": [{"metric": "answer_acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
    raise EvaluationError(
        f"{name!r} is not one of lm-eval's tasks, and its file does not say how to judge a response.",
        where=f"{files[split]}, line 1",
        got=f"fields {', '.join(first)}",
        expected=f"fields {', '.join(IFEVAL_FIELDS)} or {', '.join(ANSWER_FIELDS)}",
        mend="check the task's name, or bring the file into one of these forms",
    )


def _name_splits(
    name: str, config: Mapping[str, Any], rows: Mapping[str, list[dict[str, Any]]], files: Mapping[str, Path]
) -> dict[str, list[dict[str, Any]]]:
    """Rows by the split names that the task reads; rows of IFEval's form are checked on the way."""
    evaluated = config.get("test_split") or config.get("validation_split") or config.get("training_split")
    named = {split or str(evaluated): found for split, found in rows.items()}
    shots = config.get("fewshot_split") or config.get("training_split") or evaluated
    needed = {str(evaluated)} | ({str(shots)} if config.get("num_fewshot") else set())
    if missing := sorted(needed - set(named)):
        raise EvaluationError(
            "a task reads a split that its local data lack",
            where=name,
            got=", ".join(sorted(named)),
            expected=", ".join(sorted(needed)),
            mend=f"give a file for {missing[0]} too (--task-data {name}:{missing[0]}=FILE)",
        )
    for split, found in rows.items():
        if str(config.get("task")) == "ifeval":
            check_ifeval(found, files[split])
        if config.get("process_results") is judge_answer:
            check_fields(found, ANSWER_FIELDS, files[split])
            for row in found:  # answers of any JSON type in one column
                row["answer"] = json.dumps(row["answer"])
    return named


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
