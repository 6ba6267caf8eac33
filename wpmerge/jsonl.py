"""JSON Lines: one object a line, in UTF-8, with or without a byte order mark."""

import json
from collections.abc import Mapping
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
        EvaluationError: the file cannot be read or is empty, or a line is no JSON object, with its number; a field
            has a number that is not finite or a text that is no UTF-8.
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
        for field, value in entry.items():
            _require_plain(field, value, where)
        found.append((entry, where))
    if not found:
        raise EvaluationError("a JSONL file is empty", where=path, expected=expected)
    return found


def require_text(entry: Mapping[str, Any], field: str, *, where: object, expected: object) -> None:
    """Refuse an object whose ``field`` is absent, no text, or blank.

    Args:
        entry: the object.
        field: such as ``"prompt"``.
        where: the file and line that it stands in.
        expected: what the message says should stand there.

    Raises:
        EvaluationError: naming ``where`` and what is there.
    """
    value = entry.get(field)
    if not isinstance(value, str) or not value.strip():
        got = f'"{field}": {json.dumps(value)[:80]}' if field in entry else json.dumps(entry)[:80]
        raise EvaluationError(f"a line has no {field}", where=where, got=got, expected=expected)


def _require_plain(field: str, value: Any, where: str) -> None:
    """Refuse numbers that are not finite, which no reply can give, and halves of surrogate pairs, which no tokenizer
    takes and no file in UTF-8 holds."""
    place = f"{where}, field {field!r}"
    try:
        json.dumps({field: value}, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise EvaluationError(
            "a text cannot be written as UTF-8",
            where=place,
            got=f"{error.object[error.start]!r}, half of a surrogate pair",
            expected="whole characters",
            mend="write both halves of the pair, or take it out",
        ) from None
    except ValueError:
        raise EvaluationError(
            "a number is not finite",
            where=place,
            got=json.dumps(value)[:80],
            expected="numbers that JSON has, up to about 1.8e308",
            mend="write the number, or null where there is none",
        ) from None
    except RecursionError:
        raise EvaluationError("a value is nested too deeply", where=place, expected="fewer brackets") from None
