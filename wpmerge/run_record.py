"""What a run did, on disk: each stage's output, what decided it, and its files. Nothing of the user's is replaced.

Every stage has one output under the run's directory and a key, the hash of the settings that decide it, those of the
stages before among them. ``run.json`` keeps key and settings of what was done. An output with the same key is taken as
it is; one with another key is replaced only if that is asked for, and only if every file in it is the stage's own.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wpmerge.console import finite
from wpmerge.directory import read_json
from wpmerge.errors import CheckpointError, OutputError
from wpmerge.output import write_own_file
from wpmerge.provenance import versions
from wpmerge.run_recipe import RunRecipe

RECORD = "run.json"
SCHEMA = 1

State = Literal["done", "to do", "changed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One part of a run.

    Attributes:
        name: the command that does it.
        output: what it makes, under its final name only when it is whole.
        settings: what decides its result.
        key: their hash; None while a model is not at hand, so that it is not known.
        work: does it, replacing what is there if told so.
    """

    name: str
    output: Path
    settings: Mapping[str, Any]
    key: str | None
    work: Callable[[bool], object]


def make_stage(
    name: str, output: Path, settings: Mapping[str, Any], work: Callable[[bool], object], *, after: Stage | None
) -> Stage:
    """A stage with its key; what the stage before depends on decides this one too."""
    whole = {**settings, **({} if after is None else {"before": after.key})}
    known = None not in settings.get("models", {}).values() and (after is None or after.key is not None)
    text = json.dumps(finite(whole), sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest() if known else None
    return Stage(name=name, output=output, settings=json.loads(text), key=key, work=work)


def state_of(stage: Stage, record: Mapping[str, Any]) -> State:
    """Whether a stage is done, is to be done, or was done with other settings.

    Raises:
        OutputError: something that no run made is where its output goes.
    """
    if not os.path.lexists(stage.output):
        return "to do"
    kept = record.get("stages", {}).get(stage.name)
    if kept is None:
        raise OutputError(
            f"the place of the {stage.name} stage's output is taken by something that this run did not make",
            where=stage.output,
            mend="move it away, or give another directory with --out",
        )
    finished = kept.get("files") is not None or stage.output.stat().st_ino != kept.get("replaces")
    return "done" if finished and kept["key"] == stage.key else "changed"


def read_record(out: Path) -> dict[str, Any]:
    """What a run recorded in its directory; empty where there is none yet.

    Raises:
        OutputError: it cannot be read, or a later version wrote it.
    """
    file = out / RECORD
    if not file.exists():
        return {"stages": {}}
    try:
        found = read_json(file)
    except CheckpointError as error:
        raise OutputError("the record of a run cannot be read", where=file, got=error.got or error.what) from None
    if found.get("kind") != "run" or found.get("schema_version") != SCHEMA or not isinstance(found.get("stages"), dict):
        raise OutputError(
            "the record of a run is of another version",
            where=file,
            got=f"{found.get('kind')} schema {found.get('schema_version')}",
            expected=f"run schema {SCHEMA}",
            mend="give another directory with --out",
        )
    return found


def write_record(out: Path, recipe: RunRecipe, record: Mapping[str, Any]) -> None:
    """Replace what the run recorded in its directory."""
    head = {"kind": "run", "schema_version": SCHEMA, "versions": versions(), "recipe": recipe.model_dump()}
    whole = finite({**head, "stages": record["stages"]})
    write_own_file(out / RECORD, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def refusal(changed: list[Stage], record: Mapping[str, Any]) -> OutputError:
    """Says what is different, stage by stage."""
    said = []
    for stage in changed:
        kept = record["stages"][stage.name]
        old, new = _flat((kept.get("replaced") or kept).get("settings", {})), _flat(stage.settings)
        apart = [name for name in {**old, **new} if old.get(name) != new.get(name) and name != "before"]
        said += [_difference(name, old.get(name), new.get(name)) for name in apart]
    return OutputError(
        "the recipe is not the one that what is there was made with",
        where=", ".join(str(stage.output) for stage in changed),
        got="; ".join(said) or "a replacement that was not finished",
        mend="give another directory with --out, or replace what is there with --overwrite",
    )


def _difference(name: str, old: object, new: object) -> str:
    """A changed setting; what is recorded as a hash is only said to differ."""
    if name.startswith(("models.", "capabilities.", "documents.")):
        return (
            f"{name} differs"
            if old is not None and new is not None
            else f"{name} is {'gone' if new is None else 'new'}"
        )
    return f"{name} is {new}, was {old}"


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return found


def files_of(output: Path) -> dict[str, int]:
    """Every file of an output and its bytes."""
    if output.is_file():
        return {"": output.stat().st_size}
    return {str(file.relative_to(output)): file.stat().st_size for file in sorted(output.rglob("*")) if file.is_file()}


def check_own(stage: Stage, record: Mapping[str, Any]) -> None:
    """Refuse to replace an output that holds a file which the stage did not write, or that was changed since."""
    kept = record["stages"][stage.name]
    known = kept.get("files") or (kept.get("replaced") or {}).get("files")
    there = files_of(stage.output)
    if known is None:
        return
    strange = [name for name, size in there.items() if known.get(name) != size]
    if strange:
        raise OutputError(
            f"the {stage.name} stage's output holds a file that it did not write, and would be replaced",
            where=stage.output,
            got=strange[0] or stage.output.name,
            mend="move it away, or give another directory with --out",
        )


def check_directory(out: Path) -> None:
    """Refuse a directory of somebody else's."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise OutputError("the run's directory is something else", where=out, mend="give another with --out")
    if any(out.iterdir()) and not (out / RECORD).is_file():
        raise OutputError(
            "the run's directory holds something else", where=out, expected=f"{RECORD}, or nothing", mend="give another"
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """The run's directory, made where it is missing, for this run alone."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise OutputError("the run's directory cannot be made", where=out, got=error.strerror) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError("another run is at work in this directory", where=out) from None
    else:
        yield
    finally:
        os.close(descriptor)
