"""Lines, their numbers, and what is no line of JSON."""

from pathlib import Path

import pytest

from wpmerge.errors import EvaluationError
from wpmerge.jsonl import read_objects, require_text


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
        (
            b'{"a": 1}\n{"p": "fine", "b": [{"c": "x\\ud800"}]}',
            r"written as UTF-8(.|\n)*line 2, field 'b'(.|\n)*'\\ud800'",
        ),
        (b'{"\\udc00": 1}', r"written as UTF-8(.|\n)*line 1, field '\\udc00'"),
        (b'{"a": {"n": NaN}}', r"not finite(.|\n)*line 1, field 'a'(.|\n)*NaN"),
        (b'{"a": -Infinity}', r"not finite(.|\n)*-Infinity"),
        (b'{"a": [1, 1e999]}', r"not finite(.|\n)*field 'a'"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        read_objects(path)
    with pytest.raises(EvaluationError, match=r"cannot be read(.|\n)*absent"):
        read_objects(tmp_path / "absent")


def test_whole_pairs_and_large_numbers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00", "n": 1e308, "i": 1' + "0" * 400 + "}\n")
    assert read_objects(path) == [({"a": "\U0001f600", "n": 1e308, "i": 10**400}, f"{path}, line 1")]


@pytest.mark.parametrize(
    ("entry", "got"),
    [
        ({"prompt": None}, '"prompt": null'),
        ({"prompt": 5}, '"prompt": 5'),
        ({"prompt": ["hi"]}, r'"prompt": \["hi"\]'),
        ({"prompt": ""}, '"prompt": ""'),
        ({"prompt": " \n"}, r'"prompt": " \\n"'),
        ({"text": "hi"}, '{"text": "hi"}'),
    ],
)
def test_a_text_is_required(entry: dict[str, object], got: str) -> None:
    with pytest.raises(EvaluationError, match=rf"has no prompt\n  where: f, line 3\n  got: {got}\n  expected: a text"):
        require_text(entry, "prompt", where="f, line 3", expected="a text")
    require_text({"prompt": "hi"}, "prompt", where="f, line 3", expected="a text")
