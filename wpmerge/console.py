"""What a person or a script sees: results on stdout as tables or JSON, messages and progress on stderr."""

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Report = Callable[[str, int, int], None]
"""Called with what is being done, units of it done, and units in all."""

PLAIN_SECONDS = 10.0
"""Seconds between two progress lines where stderr is no terminal."""
WIDE = 200
"""Columns of a table where stdout is no terminal, so that nothing in it is cut or wrapped."""

_NUMERIC = "0123456789+-–"  # what a number or its absence begins with; "" is in it too
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A result for people: a title, column names, and cells as text; columns of numbers are set right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def show(result: Mapping[str, Any], tables: Sequence[Table], *, as_json: bool) -> None:
    """Print a result on stdout: as one JSON object for scripts, or as tables for people."""
    if as_json:
        print(json.dumps(finite(result), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        for table in tables:
            print_table(table)


def print_table(table: Table) -> None:
    """Print a table on stdout, as wide as it needs to be where that is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(box=box.SIMPLE_HEAD)
    for column, name in enumerate(table.header):
        numbers = all(row[column][:1] in _NUMERIC for row in table.rows)
        made.add_column(Text(name), justify="right" if numbers else "left")
    for row in table.rows:
        made.add_row(*map(Text, row))
    screen = Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
    if table.title:
        screen.print(Text(table.title, style="bold"))
    screen.print(made)


def finite(value: Any) -> Any:
    """A value that JSON can hold: NaN and infinities become None, keys text, tuples lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value if isinstance(value, bool | int | str | None) else str(value)


def number(value: float | None, digits: int = 3) -> str:
    """A number with a few significant digits; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}"


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with so many places after the point; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def say(message: str) -> None:
    """A sentence for a person, on stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def reporting() -> Iterator[Report]:
    """Progress on stderr: a bar with the time left on a terminal, otherwise a line when work changes or takes long."""
    if not sys.stderr.isatty():
        yield _Lines().report
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """Units a second, once there are some."""

        def render(self, task: Task) -> Text:
            return Text(rate(task.speed) if task.speed and task.total else "")

    columns = (
        BarColumn(),
        TaskProgressColumn(),
        Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    name = TextColumn("{task.description}", markup=False)
    with Progress(name, *columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar).report


class _Bar:
    """One bar, for what is being done now; work that does not count its units only moves."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._stage, self._task = bar, "", None

    def report(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or self._task is None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._stage, self._task = stage, self._bar.add_task(stage, total=None)
        self._bar.update(self._task, completed=done, total=total if total > 1 else None)


class _Lines:
    """A line for each new kind of work, and one now and then while it goes on."""

    def __init__(self) -> None:
        self._stage, self._began, self._said = "", 0.0, 0.0

    def report(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._said = stage, now, now
            say(stage)
        elif now - self._said >= PLAIN_SECONDS and 0 < done < total:
            self._said = now
            seconds = now - self._began
            left = seconds * (total - done) / done
            say(f"{stage}: {100 * done // total}%, {rate(done / seconds)}, about {duration(left)} left")


def rate(per_second: float) -> str:
    """Units of work a second, as a person says them."""
    return f"{per_second:,.0f} a second" if per_second >= 10 else f"{per_second:.2g} a second"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _StderrHandler(logging.Handler):
    """Log lines to what stderr is when they are said: a progress bar may have taken its place."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")


def set_up(*, verbose: bool) -> None:
    """Send this package's log lines to stderr, and keep other libraries quiet unless everything is asked for.

    The libraries read their switches when they are imported, so this comes before that.
    """
    logger = logging.getLogger("wpmerge")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if verbose:
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
