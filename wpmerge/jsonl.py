"""JSON Lines: one object a line, in UTF-8, with or without a byte order mark."""

import json
from pathlib import Path
from typing import Any

from wpmerge.errors import EvaluationError


def read_objects(path: Path, *, expected: str = "one JSON object a line") -> list[tuple[dict[str, Any], str]]:
    """The objects of a file in order, each with the file and line it stands in; blank lines are skipped.

    Only a line feed ends a line: other separators, such as U+2028, may stand inside a text.

    Args:
        path: the file.
        expected: what messages say of a line.

    Raises:
        EvaluationError: the file cannot be read or is empty, or a line is no JSON object, with its number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError("a JSONL file cannot be read", where=path, got=error, expected=expected) from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EvaluationError("a line is not JSON", where=where, got=error, expected=expected) from error
        if not isinstance(entry, dict):
            raise EvaluationError(
                "a line is not a JSON object", where=where, got=type(entry).__name__, expected=expected
            )
        found.append((entry, where))
    if not found:
        raise EvaluationError("a JSONL file is empty", where=path, expected=expected)
    return found
