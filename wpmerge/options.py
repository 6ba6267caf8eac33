"""Options that several commands share, and option values as text → what the functions take.

A malformed value is refused with the form it should have. Nothing heavy is imported: ``--help`` needs this module.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from wpmerge import dtypes
from wpmerge.errors import WpmergeError

DTYPES = tuple(dtypes.FLOATS)
LEAST: Mapping[str, int] = {
    "prompts": 4,
    "held_out": 4,
    "reference_tokens": 1,
    "top_k": 0,
    "random_sample": 0,
    "verify_prompts": 1,
    "integrated_points": 1,
    "layer": 0,
    "tokens_per_row": 1,
    "steps": 0,
    "batch": 1,
    "evaluations": 1,
    "threads": 1,
    "max_gen_tokens": 1,
    "limit": 1,
}
"""The least values of score's, fuse's, merge's and eval's counts, for commands, recipes and functions alike."""

Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace an output of wpmerge that is already there, once the new is whole. Default: off."
    ),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Where models run, as torch names it: cpu, cuda, cuda:1.")]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream", help="Read each layer from disk when it runs, instead of keeping weights in memory. Default: off."
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory to plan for, such as 4GB: weights are streamed and work is cut to fit. Default: no limit.",
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Accept checkpoints that bring code of their own. Default: off.")
]
ConfirmUnsafeCode = Annotated[
    bool,
    typer.Option("--confirm-unsafe-code", help="Let tasks run code that a model wrote, on this machine. Default: off."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout. Default: off.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Let every library say what it does, on stderr. Default: off.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE", help=f"Of the written weights: {', '.join(DTYPES)}. Default: each tensor's in the base."
    ),
]
ShardSize = Annotated[
    str, typer.Option(metavar="SIZE", help="Most weights per file, in bytes, KB, MB, GB, MiB or GiB.")
]
Threads = Annotated[
    int, typer.Option(metavar="N", min=LEAST["threads"], help="Blocks merged at a time, a thread each.")
]
AllowNan = Annotated[bool, typer.Option("--allow-nan", help="Let numbers pass that are not finite. Default: off.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="NAME=PATH",
        help="Where an input lives now; the base's name is base. Repeat for others. Default: where it was.",
    ),
]

_EXPERT_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def named(option: str, values: Sequence[str], *, form: str = "NAME=PATH") -> dict[str, str]:
    """``NAME=VALUE`` texts as a mapping, in the order given.

    Raises:
        WpmergeError: no ``=``, an empty name or value, a name given twice.
    """
    found: dict[str, str] = {}
    for text in values:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise WpmergeError(f"{option} is malformed", got=repr(text), expected=form)
        if name in found:
            raise WpmergeError(
                f"{option} names {name} twice", got=f"{found[name]} and {value}", mend="give each a name of its own"
            )
        found[name] = value
    return found


def expert_names(experts: Mapping[str, str]) -> Mapping[str, str]:
    """The experts, if their names can stand in files and plans.

    Raises:
        WpmergeError: a name with other characters, or the base's.
    """
    for name in experts:
        if name == "base" or not _EXPERT_NAME.fullmatch(name):
            raise WpmergeError(
                "--expert has a name that no expert may bear",
                got=repr(name),
                expected="letters, digits, '_', '.', '-', beginning with a letter or digit; not base",
            )
    return experts


def models_by_name(values: Sequence[str], *, what: str) -> dict[str, str]:
    """``NAME=PATH`` or ``PATH`` texts as a mapping; the name of a bare path is its last part.

    Args:
        values: the texts.
        what: what they are, for messages.

    Raises:
        WpmergeError: an empty text or name, or a name given twice.
    """
    whole = []
    for text in values:
        name, equals, _ = text.partition("=")
        bare = not equals or "/" in name  # a path may hold a "=" too
        whole.append(
            f"{Path(text).resolve().name if text in ('.', '..') else Path(text).name}={text}" if bare else text
        )
    return named(what, whole, form="NAME=PATH or PATH")


def scales(values: Sequence[str]) -> dict[str, float]:
    """``X`` or ``NAME=X`` texts as expert → scale; the one without a name, for all others, is under ``""``.

    Raises:
        WpmergeError: no number, or an expert named twice.
    """
    found: dict[str, float] = {}
    for text in values:
        name, _, value = text.rpartition("=")
        try:
            scale = float(value)
        except ValueError:
            raise WpmergeError("--scale is malformed", got=repr(text), expected="X or NAME=X, X a number") from None
        if name.strip() in found or ("=" in text and not name.strip()):
            raise WpmergeError("--scale names an expert twice, or none", got=repr(text), expected="X or NAME=X")
        found[name.strip()] = scale
    return found


def task_data(values: Sequence[str]) -> dict[str, dict[str, Path]]:
    """``TASK=FILE`` or ``TASK:SPLIT=FILE`` texts as task → split → file; the evaluated split is ``""``.

    Raises:
        WpmergeError: a malformed text, or a split given twice.
    """
    found: dict[str, dict[str, Path]] = {}
    for key, file in named("--task-data", values, form="TASK=FILE or TASK:SPLIT=FILE").items():
        task, _, split = key.partition(":")
        found.setdefault(task, {})[split] = Path(file)
    return found


def keyed_values(option: str, values: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts as a mapping; a value that is JSON is read as such, any other is text."""
    import json

    found: dict[str, Any] = {}
    for key, value in named(option, values, form="KEY=VALUE").items():
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def one_of(option: str, value: str, allowed: Sequence[str]) -> Any:
    """The value, if it is one of those allowed; ``Any``, since callers pass it on as one of a few literals.

    Raises:
        WpmergeError: it is not; names the nearest.
    """
    if value in allowed:
        return value
    near = difflib.get_close_matches(value, allowed, n=1)
    mend = f"did you mean {near[0]}?" if near else None
    raise WpmergeError(f"{option} has no such value", got=repr(value), expected=", ".join(allowed), mend=mend)


def check_counts(**given: int | None) -> None:
    """Refuse a count below its least value; None stands for a default of its own.

    Raises:
        WpmergeError: names the first.
    """
    for name, value in given.items():
        if value is not None and (not isinstance(value, int) or value < LEAST[name]):
            raise WpmergeError(
                f"{name} is out of range", got=repr(value), expected=f"a whole number from {LEAST[name]} on"
            )


def all_of(option: str, values: Sequence[str], allowed: Sequence[str]) -> tuple[Any, ...]:
    """The values, each once, if all are allowed; see :func:`one_of`."""
    return tuple(dict.fromkeys(one_of(option, value, allowed) for value in values))


def byte_size(option: str, value: str) -> int:
    """Bytes, from ``5GB`` (10⁹ each), ``512MiB`` (2²⁰ each) or a plain number.

    Raises:
        WpmergeError: no size, or less than one byte.
    """
    match = _SIZE.fullmatch(value.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise WpmergeError(f"{option} is no size", got=repr(value), expected="a number and B, KB, MB, GB, MiB or GiB")
    return size


def stored_dtype(option: str, value: str | None) -> dtypes.Dtype | None:
    """A dtype by name; None stays None.

    Raises:
        WpmergeError: not one that checkpoints are written in.
    """
    return None if value is None else dtypes.FLOATS[one_of(option, value, DTYPES)]


def device(value: str) -> str:
    """A device that torch has here.

    Raises:
        WpmergeError: torch knows no such device, or it is not there.
    """
    import torch

    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises any of these
        raise WpmergeError(
            "--device cannot be used",
            got=f"{value!r}: {str(error).splitlines()[0]}",
            expected="cpu, or cuda or cuda:N where torch finds a GPU",
        ) from None
    return value


def batch_size(value: str) -> int | str:
    """A number of prompts, or lm-eval's ``auto``.

    Raises:
        WpmergeError: neither.
    """
    if value.isdecimal() and int(value) > 0:
        return int(value)
    if value == "auto" or re.fullmatch(r"auto:\d+", value):
        return value
    raise WpmergeError("--batch-size is malformed", got=repr(value), expected="a number of prompts, or auto")


def skills(values: Sequence[str], models: Mapping[str, Any]) -> dict[str, str]:
    """``NAME=METRIC`` texts as expert → metric.

    Raises:
        WpmergeError: a malformed text, or a name that is no evaluated model.
    """
    found = named("--skill", values, form="NAME=METRIC, as in math=gsm8k/exact_match")
    if unknown := [name for name in found if name not in models]:
        raise WpmergeError("--skill names no evaluated model", got=unknown[0], expected=", ".join(models))
    return found
