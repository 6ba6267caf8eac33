"""Documents of local tasks: JSONL files, checked row by row, handed to lm-eval in memory."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wpmerge.errors import EvaluationError
from wpmerge.ifeval import ifeval_checkers

IFEVAL_FIELDS = ("key", "prompt", "instruction_id_list", "kwargs")
"""What lm-eval's ifeval task reads of a document."""

ANSWER_FIELDS = ("prompt", "answer")
"""What :func:`judge_answer` needs of a document."""

_ANSWER_IS = re.compile(r"answer is\s*\$?(-?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)


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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; blank lines are skipped.

    Raises:
        EvaluationError: the file is missing, empty, or has a line that is no JSON object (named by its number).
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError("a task's local data cannot be read.", where=path, got=error) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError("a line is not JSON", where=f"{path}, line {number}", got=error) from error
        if not isinstance(row, dict):
            raise EvaluationError(
                "a line is not a JSON object",
                where=f"{path}, line {number}",
                got=type(row).__name__,
                expected="an object",
            )
        rows.append(row)
    if not rows:
        raise EvaluationError("a task's local data are empty.", where=path, expected="one JSON object a line")
    return rows


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


def check_ifeval(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Refuse documents that IFEval's checkers cannot judge: fields, lengths, instruction names.

    Raises:
        EvaluationError: naming the first such document.
    """
    check_fields(rows, IFEVAL_FIELDS, path)
    known = ifeval_checkers()
    for number, row in enumerate(rows, start=1):
        where = f"{path}, document {number}"
        ids, kwargs = row["instruction_id_list"], row["kwargs"]
        if not isinstance(ids, list) or not isinstance(kwargs, list) or not ids or len(ids) != len(kwargs):
            raise EvaluationError(
                "instructions and their arguments do not pair up",
                where=where,
                got=f"{ids} and {kwargs}",
                expected="two lists of one length, at least 1",
            )
        for each in ids:
            if each not in known:
                near = difflib.get_close_matches(str(each), known, n=3)
                raise EvaluationError(
                    "unknown IFEval instruction", where=where, got=each, expected=", ".join(near or sorted(known))
                )


def judge_answer(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, bool]:
    """Whether a response gives the document's answer: the last "answer is N" for a number, the reply read as JSON for
    an object or list, the reply itself for a string."""
    answer, response = json.loads(doc["answer"]), results[0].strip()
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        try:
            return {"answer_acc": _canonical(response) == _canonical(doc["answer"])}
        except (ValueError, RecursionError):  # no JSON, or brackets without end
            return {"answer_acc": False}
    if isinstance(answer, str):
        return {"answer_acc": response == answer.strip()}
    said = _ANSWER_IS.findall(response)
    return {"answer_acc": bool(said) and float(said[-1].replace(",", "")) == float(answer)}


def _canonical(text: str) -> str:
    """JSON in one spelling: 1 and 1.0 are the same, 1 and true are not."""
    return json.dumps(json.loads(text, parse_int=float), sort_keys=True)
