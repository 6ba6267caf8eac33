"""Documents of local tasks: JSONL files, checked row by row, put into a task's configuration for lm-eval."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wpmerge.checkers import is_named, judge_named, try_checkers
from wpmerge.errors import EvaluationError, reason_of
from wpmerge.ifeval import check_arguments, read_instructions, require_punkt
from wpmerge.jsonl import read_objects, require_text
from wpmerge.judges import gives_answer

IFEVAL_FIELDS = ("key", "prompt", "instruction_id_list", "kwargs")
"""What lm-eval's ifeval task reads of a document."""

ANSWER_FIELDS = ("prompt", "answer")
"""What :func:`judge_answer` needs of a document."""

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def in_memory(rows: Mapping[str, list[dict[str, Any]]]) -> Callable[..., Any]:
    """What lm-eval calls for a task's data set: the rows in memory, so that no cache folder is written.

    Keys that a row's nested objects lack become None, as in the data sets that the hub holds.
    """

    def local_rows(**_: Any) -> Any:
        import datasets

        try:
            return datasets.DatasetDict({split: datasets.Dataset.from_list(found) for split, found in rows.items()})
        except (TypeError, ValueError) as error:  # pyarrow's own errors derive from these
            raise EvaluationError(
                "the documents of a local file do not fit in one table", got=error, expected="one type for each field"
            ) from error

    return local_rows


def local_config(
    name: str, config: Mapping[str, Any] | None, ifeval: Mapping[str, Any], files: Mapping[str, Path]
) -> dict[str, Any]:
    """lm-eval's configuration of a task with local documents in the place of its data set.

    Args:
        name: the task's.
        config: its own configuration; None for a task that exists only as a local file.
        ifeval: the configuration of lm-eval's ifeval task.
        files: split to JSONL file; the evaluated split is ``""``.

    Raises:
        EvaluationError: a file cannot be read, a document does not have what the task reads, a split is lacking, has
            two files, or is none that the task reads.
    """
    rows = {split: [row for row, _ in read_objects(path)] for split, path in files.items()}
    config = config or _own_config(name, rows, files, ifeval)
    _check_splits(name, config, files)
    for split, found in rows.items():
        check_prompts(found, config, files[split])
        if str(config.get("task")) == "ifeval":
            check_ifeval(found, files[split])
            if any(is_named(each) for part in rows.values() for row in part for each in row["instruction_id_list"]):
                config = {**config, "process_results": judge_named}
                for row in found:  # arguments of any JSON type in one column
                    row["kwargs"] = json.dumps(row["kwargs"])
        elif config.get("process_results") is judge_answer:
            check_fields(found, ANSWER_FIELDS, files[split])
            for row in found:  # answers of any JSON type in one column
                row["answer"] = json.dumps(row["answer"])
        else:  # what is absent in one row would be read as null
            check_fields(found, tuple(dict.fromkeys(field for row in found for field in row)), files[split])
    splits, named = _fit_splits(name, config, rows)
    own = {"task": name, "custom_dataset": in_memory(named), "dataset_name": None, "dataset_kwargs": None}
    return {**config, **splits, **own}


def _own_config(
    name: str, rows: Mapping[str, Sequence[Mapping[str, Any]]], files: Mapping[str, Path], ifeval: Mapping[str, Any]
) -> Mapping[str, Any]:
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
        f"{name!r} is not one of lm-eval's tasks, and its file does not say how to judge a response",
        where=f"{files[split]}, line 1",
        got=f"fields {', '.join(first)}",
        expected=f"fields {', '.join(IFEVAL_FIELDS)} or {', '.join(ANSWER_FIELDS)}",
        mend="check the task's name, or bring the file into one of these forms",
    )


def _fit_splits(
    name: str, config: Mapping[str, Any], rows: Mapping[str, list[dict[str, Any]]]
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Rows by the split names that the task reads, and the task's splits without those that it has no use for: lm-eval
    reads the split of examples even where none are shown."""
    examples = config.get("fewshot_config") or {}
    evaluated, shots = _splits_read(config)
    named = {split or evaluated: found for split, found in rows.items()}
    needed = {evaluated} | ({shots} if config.get("num_fewshot") and shots else set())
    if missing := sorted(needed - set(named)):
        raise EvaluationError(
            "a task reads a split that its local data lack",
            where=name,
            got=", ".join(sorted(named)),
            expected=", ".join(sorted(needed)),
            mend=f"give a file for {missing[0]} too (--task-data {name}:{missing[0]}=FILE)",
        )
    splits: dict[str, Any] = {key: None for key in _SPLITS if config.get(key) not in named}
    if examples.get("split") not in (None, *named):
        splits["fewshot_config"] = {key: value for key, value in examples.items() if key != "split"}
    return splits, named


def _splits_read(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """The split that a task is evaluated on, and the one that its examples come from, if any does."""
    examples = config.get("fewshot_config") or {}
    evaluated = str(config.get("test_split") or config.get("validation_split") or config.get("training_split"))
    shots = examples.get("split") or config.get("fewshot_split")
    if not shots and not examples.get("samples"):
        shots = config.get("training_split") or evaluated
    return evaluated, str(shots) if shots else None


def _check_splits(name: str, config: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Refuse a file for a split that the task does not read, and a second file for one that it does."""
    evaluated, shots = _splits_read(config)
    read = [evaluated, *([shots] if shots and shots != evaluated else [])]
    if stray := [split for split in files if split and split not in read]:
        raise EvaluationError(
            "a file is given for a split that the task does not read",
            where=f"{name}: {files[stray[0]]}",
            got=stray[0],
            expected=", ".join(read),
            mend=f"leave it out, or name another split (--task-data {name}={files[stray[0]]} is {evaluated})",
        )
    if "" in files and evaluated in files:
        raise EvaluationError(
            "two files are given for one split",
            where=name,
            got=f"{files['']} and {files[evaluated]}",
            expected=f"one file for {evaluated}, which is the split of {name}=FILE too",
            mend="leave one of them out, or join them in one file",
        )


def check_readable(name: str, task: Any, files: Mapping[str, Path]) -> None:
    """Refuse local documents that the loaded task cannot turn into prompts, examples and answers, before any model is
    run.

    Raises:
        EvaluationError: naming the first such document and what went wrong, or that there are too few examples; a
            checker of the user's does not take a document.
    """
    evaluated = task.config.test_split or task.config.validation_split
    own, examples = (files.get(split, files.get("")) for split in (evaluated, task.fewshot_cfg.split))
    for number, document in enumerate(task.eval_docs, start=1):
        try:
            task.doc_to_text(document)
            task.doc_to_target(document)
            if task.config.doc_to_choice is not None:
                task.doc_to_choice(document)
            # every document has the first one's fields, and what instructions need is checked when rows are read
            if number == 1 and callable(task.config.process_results) and task.OUTPUT_TYPE == "generate_until":
                _judge_nothing(task, document)
            if task.config.process_results is judge_named:
                try_checkers(document, f"{own}, document {number}")
        except EvaluationError:
            raise
        except Exception as error:  # whatever the task's templates and functions raise
            raise unreadable(name, f"{own}, document {number}", error, document) from error
    if task.config.num_fewshot:
        _check_examples(name, task, examples or own)


def _check_examples(name: str, task: Any, path: Path | None) -> None:
    found = list(task.fewshot_docs())
    needed = task.config.num_fewshot + (task.fewshot_cfg.split == task.config.test_split)  # no document is its own
    if len(found) < needed:
        raise EvaluationError(
            "a task shows more examples than its local data have",
            where=f"{name}: {path}",
            got=len(found),
            expected=f"at least {needed}",
            mend="give the task's own training split, or more rows",
        )
    for number, document in enumerate(found, start=1):
        try:
            task.doc_to_text(document, task.fewshot_cfg.doc_to_text)
            task.doc_to_target(document, task.fewshot_cfg.doc_to_target)
        except Exception as error:
            raise unreadable(name, f"{path}, example {number}", error, document) from error


def _judge_nothing(task: Any, document: Mapping[str, Any]) -> None:
    """Let the task judge an empty response, for the fields that only its judge reads."""
    if getattr(task, "UNSAFE_CODE", False):
        return
    try:
        task.process_results(document, [""])
    except KeyError as error:
        if error.args and error.args[0] not in document:
            raise
    except Exception:  # an empty response may upset a judge, and says nothing of the document then
        return


def unreadable(
    name: str, where: object, error: Exception, document: Mapping[str, Any] | None = None
) -> EvaluationError:
    """What to say when a task's own code fails on local documents."""
    return EvaluationError(
        f"the local documents of {name} are not what the task reads",
        where=where,
        got=reason_of(error) + ("" if document is None else f"; the document has {', '.join(document)}"),
        expected="the fields of the task's own data set",
        mend="name and fill the fields as that data set does",
    )


def check_fields(rows: Sequence[Mapping[str, Any]], fields: Sequence[str], path: Path) -> None:
    """Refuse documents that lack one of ``fields``.

    Raises:
        EvaluationError: naming the first such document and what it lacks.
    """
    for number, row in enumerate(rows, start=1):
        if missing := [field for field in fields if field not in row]:
            raise EvaluationError(
                "a document lacks a field",
                where=f"{path}, document {number}",
                got=f"no {', '.join(missing)}",
                expected=", ".join(fields),
            )


def check_prompts(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], path: Path) -> None:
    """Refuse documents whose prompt is no text, or blank, where the task's prompt is one of their fields and is replied
    to; that a field is absent is left to :func:`check_fields`.

    Raises:
        EvaluationError: naming the first such document and what it has.
    """
    field = config.get("doc_to_text")
    if config.get("output_type") != "generate_until" or not isinstance(field, str):
        return
    for number, row in enumerate(rows, start=1):
        if field in row:
            require_text(row, field, where=f"{path}, document {number}", expected="a text that is not blank")


def check_ifeval(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Refuse documents that the checkers at hand cannot judge: fields, lengths, instruction names, and arguments of
    IFEval's own instructions. Those of the user's are tried by :func:`check_readable`.

    Raises:
        EvaluationError: naming the first such document; nltk's tables are needed and not installed.
    """
    check_fields(rows, IFEVAL_FIELDS, path)
    mend = (
        "check its spelling, or name the Python file that has its checker, such as IFBench's "
        "instructions_registry.py, with wpmerge eval --checkers FILE"
    )
    places = [f"{path}, document {number}" for number in range(1, len(rows) + 1)]
    read = [
        read_instructions(row["instruction_id_list"], row["kwargs"], where=where, mend=mend)
        for row, where in zip(rows, places, strict=True)
    ]
    require_punkt({name for pairs in read for name, _ in pairs}, where=path)
    for row, where, pairs in zip(rows, places, read, strict=True):
        for name, kwargs in pairs:
            if not is_named(name):
                check_arguments(name, kwargs, row["prompt"], where=where)


def judge_answer(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, bool]:
    """Whether a response gives the document's answer, which is JSON text; see :func:`wpmerge.judges.gives_answer`."""
    return {"answer_acc": gives_answer(results[0], json.loads(doc["answer"]))}
