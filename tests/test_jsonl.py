"""Lines, their numbers, and what is no line of JSON."""

from pathlib import Path

import pytest

from wpmerge.errors import EvaluationError
from wpmerge.jsonl import read_objects


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y\u0085z"}\r\n\n  \n{"b": 1}'.encode())
    assert read_objects(path) == [
        ({"a": "x\u2028y\u0085z"}, f"{path}, line 1"),
        ({"b": 1}, f"{path}, line 4"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"a": 1}\n{', r"not JSON(.|\n)*line 2"),
        (b"[" * 100_000, r"not JSON(.|\n)*line 1"),
        (b"[1]", r"not a JSON object(.|\n)*line 1(.|\n)*list"),
        (b"\xff", "cannot be read"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        read_objects(path)
    with pytest.raises(EvaluationError, match=r"cannot be read(.|\n)*absent"):
        read_objects(tmp_path / "absent")
