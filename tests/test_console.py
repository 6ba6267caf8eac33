"""Results on stdout, everything else on stderr."""

import json
import logging
import math
import os
import pty
import re
import subprocess
import sys

import pytest

from wpmerge import console
from wpmerge.console import Table, duration, finite, number, print_table, rate, reporting, set_up, show

TABLE = Table(title="what was found [0]", header=("unit", "recovery"), rows=[("head.0.1", "0.5"), ("x" * 150, "–")])


def test_a_table_is_as_wide_as_it_needs_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(TABLE)
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert err == ""
    assert out.startswith("what was found [0]\n")
    assert ["head.0.1", "0.5"] in lines and ["x" * 150, "–"] in lines


def test_columns_of_numbers_are_set_right_and_others_left(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(Table(title="", header=("n", "t"), rows=[("1", "a"), ("100", "bcd"), ("–", "e")]))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert rows[0].startswith("    n   t")
    assert rows[2:] == [row.ljust(len(rows[2])) for row in ("    1   a", "  100   bcd", "    –   e")]


def test_json_is_all_there_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    show({"a": math.nan, 1: (2, "é"), "path": math.inf}, [TABLE], as_json=True)
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({"a": None, "1": [2, "é"], "path": None}, "")


def test_finite_keeps_what_json_has_and_turns_the_rest_into_text() -> None:
    assert finite({"b": True, "n": None, "l": [1.5, -math.inf], "o": int}) == {
        "b": True,
        "n": None,
        "l": [1.5, None],
        "o": "<class 'int'>",
    }


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (math.nan, "–"), (0.12345, "0.123"), (0, "0"), (1e-7, "1e-07")]
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plain_progress_is_a_line_for_new_work_and_seldom_more(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting() as report:
        report("reading", 0, 1)
        for done in range(1000):
            report("running", done, 1000)
    assert capsys.readouterr() == ("", "reading\nrunning\n")


def test_plain_progress_tells_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    with reporting() as report:
        report("running", 0, 4)
        report("running", 1, 4)
        report("running", 4, 4)
    assert re.fullmatch(r"running\nrunning: 25%, [\d,]+ a second, about 0 s left\n", capsys.readouterr().err)
    assert (rate(1234.5), rate(0.0123)) == ("1,234 a second", "0.012 a second")


def test_a_terminal_gets_a_bar_on_stderr_and_nothing_on_stdout() -> None:
    code = (
        "from wpmerge.console import reporting, say\n"
        "with reporting() as report:\n"
        "    report('[half]', 0, 1)\n"
        "    report('[half]', 1, 2)\n"
        "    say('a word')\n"
        "    report('writing', 3, 4)\n"
    )
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    run = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=slave, env=environment, timeout=60, check=True
    )
    os.close(slave)
    seen = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the other end is closed and everything is read
            break
        if not piece:
            break
        seen += piece
    os.close(master)
    text = seen.decode()
    assert run.stdout == b""
    assert "writing" in text and "75%" in text and "left" in text and "a word" in text


def test_warnings_of_the_package_reach_stderr_once(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(verbose=False)
    set_up(verbose=False)
    logging.getLogger("wpmerge.checkpoint").warning("expert %s differs", "a")
    logging.getLogger("wpmerge.checkpoint").info("not asked for")
    assert capsys.readouterr() == ("", "warning: expert a differs\n")
    set_up(verbose=True)
    logging.getLogger("wpmerge.checkpoint").info("asked for")
    assert capsys.readouterr().err == "info: asked for\n"
    set_up(verbose=False)


def test_other_libraries_are_quiet_unless_asked() -> None:
    code = (
        "import warnings; from wpmerge.console import set_up; set_up(verbose={}); import huggingface_hub.utils as u;"
        "warnings.warn('mind the gap'); print(u.are_progress_bars_disabled())"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    said = {}
    for verbose in (False, True):
        command = [sys.executable, "-c", code.format(verbose)]
        run = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=60, check=True)
        said[verbose] = (run.stdout.strip(), "mind the gap" in run.stderr)
    assert said == {False: ("True", False), True: ("False", True)}
