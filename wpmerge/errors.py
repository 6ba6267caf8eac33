"""Errors that a user can mend. Anything else is a bug and may show its traceback."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import ValidationError


class WpmergeError(Exception):
    """What went wrong, in terms a user can act on; ``cli`` prints it and exits with code 2.

    Args:
        what: one sentence that names the fault.
        where: the file, tensor, line or option it was found in.
        got: what was there.
        expected: what should have been there.
        mend: what to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        mend: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.mend = what, where, got, expected, mend
        details = {"where": where, "got": got, "expected": expected, "mend": mend}
        lines = [what, *(f"  {label}: {value}" for label, value in details.items() if value is not None)]
        super().__init__("\n".join(lines))


class CheckpointError(WpmergeError):
    """A checkpoint cannot be read, or does not fit the others."""


class CapabilityError(WpmergeError):
    """A capability file is malformed, or its prompts cannot be used."""


class AnchorError(WpmergeError):
    """No layer gives a reliable readout."""


class RecipeError(WpmergeError):
    """A recipe or plan asks for something undefined."""


class OutputError(WpmergeError):
    """The output cannot be written where it was asked for."""


class EvaluationError(WpmergeError):
    """A task or its data is not at hand, or a model cannot be evaluated."""


def check_ranges(
    settings: object, ranges: Mapping[str, tuple[float, float]], *, kind: type[WpmergeError] = RecipeError
) -> None:
    """Refuse settings of which a number is out of its range.

    Args:
        settings: has the numbers as attributes.
        ranges: name → least and greatest value, both allowed.
        kind: of the error.

    Raises:
        WpmergeError: of the given kind; names the first such number. NaN is in no range.
    """
    for name, (low, high) in ranges.items():
        if not low <= getattr(settings, name) <= high:
            raise kind(f"{name} is out of range", got=getattr(settings, name), expected=f"{low} to {high}")


_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says of it, on CUDA, MPS and XPU, on the CPU of Linux and macOS, and of Windows."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device. Asks no torch, which may not have been imported."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _NO_MEMORY)


def reason_of(error: BaseException, *, lines: int = 1) -> str:
    """An error's kind and the first lines of what it says, in one."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    return f"{type(error).__name__}: {' '.join(said[:lines])}"


def describe(error: ValidationError) -> str:
    """A schema violation in one line: the first fault, and how many there are."""
    faults = error.errors(include_url=False)
    place = ".".join(str(part) for part in faults[0]["loc"])
    return f"{place}: {faults[0]['msg']}" + (f" ({len(faults)} faults in all)" if len(faults) > 1 else "")
