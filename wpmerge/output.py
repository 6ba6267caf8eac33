"""Output directories that appear under their final name only when they are whole.

Work goes to a hidden sibling, ``.NAME.wpmerge``, on the same file system, and is renamed into place at the end. After
a crash the sibling stays: a rerun with the same fingerprint finds the files that were finished and goes on from there.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from wpmerge.errors import OutputError, WpmergeError, ran_out_of_memory

# A directory is replaced only if it holds one of these: --overwrite is for our outputs, nobody's home or model.
OWN_FILES = (
    "merge.json",
    "plan.json",
    "scores.json",
    "evaluation.json",
    "proof.json",
    "figures.json",
    "wpmerge.json",
)
MARK = OWN_FILES[-1]
"""Of outputs that have none of the others."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of an OSError: there is no room, or the process may not write so much."""

_EXCHANGE, _AT_FDCWD = 2, -100  # renameat2(2), linux/fs.h


def check_output(out: Path, *, inputs: Iterable[Path], overwrite: bool) -> None:
    """Refuse an output path before any work is done.

    Args:
        out: the final name.
        inputs: directories that are read; ``out`` may not be, contain or lie inside one of them.
        overwrite: replace a directory of ours that is already there, once the new one is whole.

    Raises:
        OutputError: the path is taken, is an input's, or is no place for a directory.
    """
    for path in inputs:
        mine, theirs = out.resolve(), path.resolve()
        if mine == theirs or mine in theirs.parents or theirs in mine.parents:
            relation = "is" if mine == theirs else "contains" if mine in theirs.parents else "lies inside"
            raise OutputError(f"the output {relation} an input", where=out, got=path, mend="choose another output path")
    if not os.path.lexists(out):
        _check_place(out)
        return
    if out.is_symlink() or not out.is_dir():
        raise OutputError("the output path is not a directory", where=out, mend="choose another output path")
    if not overwrite:
        raise OutputError(
            "the output directory exists", where=out, mend="choose another path, or replace it with --overwrite"
        )
    if any(out.iterdir()) and not any((out / name).is_file() for name in OWN_FILES):
        raise OutputError(
            "refused to replace a directory that is not an output of wpmerge",
            where=out,
            expected=f"one of {', '.join(OWN_FILES)} in it",
            mend="remove it yourself, or choose another output path",
        )


def _check_place(out: Path) -> None:
    """Refuse a name under which nothing can be made, before work is done for it."""
    parent = next(path for path in out.absolute().parents if os.path.lexists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        got = "it may not be written" if parent.is_dir() else "it is no directory"
        raise OutputError("cannot write beside the output path", where=out, got=f"{parent}: {got}")


def check_output_file(out: Path, *, overwrite: bool) -> None:
    """Refuse an output file before any work is done.

    Raises:
        OutputError: the path is taken, or is no place for a file.
    """
    try:
        taken = out.is_dir()
    except OSError as error:
        raise OutputError("the output path cannot be used", where=out, got=error.strerror) from None
    if taken:
        raise OutputError("the output path is a directory", where=out, mend="name a file in it")
    if os.path.lexists(out) and not overwrite:
        raise OutputError("the output file exists", where=out, mend="choose another, or replace it with --overwrite")
    if not out.absolute().parent.is_dir():
        raise OutputError("there is no such directory for the output", where=out.absolute().parent)
    _check_place(out)


def check_space(out: Path, *, total: int, largest: int = 0) -> None:
    """Refuse an output that the file system or the process's file-size limit cannot hold.

    Args:
        out: the final name.
        total: bytes still to be written.
        largest: bytes of the largest single file.

    Raises:
        OutputError: names path, need and what is free.
    """
    parent = next(path for path in [out.absolute().parent, *out.absolute().parents] if path.exists())
    free = shutil.disk_usage(parent).free
    if total > free:
        raise OutputError(
            "not enough disk space for the output",
            where=out,
            got=f"{free:,} bytes free",
            expected=f"{total:,} bytes",
            mend="free some space, or choose another file system",
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and largest > limit:
        raise OutputError(
            "the process's file-size limit is below the largest output file",
            where=out,
            got=f"{limit:,} bytes (ulimit -f)",
            expected=f"{largest:,} bytes",
            mend="raise the limit, or ask for smaller shards",
        )


@contextlib.contextmanager
def output_directory(
    out: Path, *, inputs: Iterable[Path] = (), overwrite: bool = False, fingerprint: str = "", total: int = 0
) -> Iterator[Path]:
    """Yield a directory to fill; it takes its final name when the block ends without an exception.

    Args:
        out: the final name.
        inputs: directories that are read, see :func:`check_output`.
        overwrite: replace a directory of ours that is already there.
        fingerprint: identifies the work; files finished by a killed run with the same fingerprint are still there.
            Empty: never resumed.
        total: bytes that will be written, for the message when the disk fills up.

    An exception removes what was written; an interrupt, a kill or memory that ran out leave it for the next run.

    Raises:
        OutputError: the path is refused, another run writes there, or the disk filled up.
    """
    out = Path(os.path.normpath(out.absolute()))
    box = out.with_name(f".{out.name}.wpmerge")
    _recover(out, box, fingerprint)
    check_output(out, inputs=inputs, overwrite=overwrite)
    with room_is_said(out, total), _locked(out, box):
        try:
            staging = _open_box(box, fingerprint)
            yield staging
            sync_directory(staging)
            _put_in_place(staging, out, box, fingerprint)
        except Exception as error:
            if not ran_out_of_memory(error):
                _remove(box)
            raise
        _remove(box)


@contextlib.contextmanager
def work_directory(out: Path, *, fingerprint: str) -> Iterator[Path]:
    """Yield a hidden directory beside an output for what is finished of the work on it; gone when the output is there.

    Args:
        out: the output's final name.
        fingerprint: identifies the work; what another work has left is removed.

    An interrupt, a kill, and what a user can mend leave what is finished for the next run; another fault removes it.

    Raises:
        OutputError: nothing can be written there, another run is at work, or the disk is full.
    """
    out = Path(os.path.normpath(out.absolute()))
    work = out.with_name(f".{out.name}.wpmerge-work")
    with room_is_said(out), _locked(out, work):
        try:
            yield _open_box(work, fingerprint)
        except Exception as error:
            mended = isinstance(error, WpmergeError | OSError) or ran_out_of_memory(error)
            if not mended or not any(path.is_file() for path in (work / "out").rglob("*")):
                _remove(work)
            raise
        _remove(work)


@contextlib.contextmanager
def room_is_said(out: Path, total: int = 0) -> Iterator[None]:
    """Turn a full disk, or the process's limit on files, into an error that a user can mend.

    Args:
        out: what is written, for the message.
        total: how many bytes it takes; 0 for unknown.

    Raises:
        OutputError: there was no room.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OutputError(
            f"the output could not be written: {error.strerror}",
            where=out,
            expected=f"room for {total:,} bytes" if total else None,
            mend="free some space or raise the limit, then run the same command again",
        ) from error


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file in one piece, on disk when this returns, with the permissions that the user's umask gives."""
    partial = path.with_name(f".{path.name}.wpmerge.part")
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def mark(directory: Path, what: str) -> None:
    """Say that a directory is an output of wpmerge, where none of its own files does.

    Args:
        directory: the output.
        what: is in it.
    """
    write_file(directory / MARK, json.dumps({"made_by": "wpmerge", "what": what}, indent=1) + "\n")


def write_own_file(path: Path, data: bytes | str) -> None:
    """Write a file that lies in no directory of :func:`output_directory`.

    Raises:
        OutputError: it cannot be written; nothing is left of it then, and what was under its name stays.
    """
    try:
        write_file(path, data)
    except OSError as error:
        raise OutputError("a file cannot be written", where=path, got=error.strerror) from None


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Busy(OutputError):
    """Another process holds the lock."""


@contextlib.contextmanager
def _locked(out: Path, box: Path) -> Iterator[None]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        box.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError("cannot write beside the output path", where=out, got=error.strerror) from None
    with (box / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _Busy("another run is writing this output", where=out) from None
        yield


def _open_box(box: Path, fingerprint: str) -> Path:
    """The directory to fill: what a killed run of the same work left, or an empty one."""
    staging = box / "out"
    if not fingerprint or _state(box) != {"phase": "fill", "fingerprint": fingerprint}:
        shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(exist_ok=True)
    write_file(box / "state.json", json.dumps({"phase": "fill", "fingerprint": fingerprint}))
    return staging


def _state(box: Path) -> dict[str, str | int]:
    try:
        found = json.loads((box / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _put_in_place(staging: Path, out: Path, box: Path, fingerprint: str) -> None:
    """Give the finished directory its name. From here on nothing in the box counts as unfinished work."""
    state = {"phase": "swap", "fingerprint": fingerprint, "inode": staging.stat().st_ino}
    write_file(box / "state.json", json.dumps(state))
    sync_directory(box)
    if not out.exists():
        staging.rename(out)
    elif not _exchange(staging, out):
        out.rename(box / "old")
        staging.rename(out)
    sync_directory(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, where the kernel and the file system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _EXCHANGE) == 0


def _recover(out: Path, box: Path, fingerprint: str) -> None:
    """Finish, take up again, or clear away what a run killed during the swap left behind."""
    state = _state(box)
    if state.get("phase") != "swap":
        return
    with contextlib.suppress(_Busy), _locked(out, box):
        staging = box / "out"
        finished = staging.exists() and staging.stat().st_ino == state.get(
            "inode"
        )  # else it holds what was swapped out
        if finished and fingerprint and state["fingerprint"] == fingerprint and not (box / "old").exists():
            write_file(box / "state.json", json.dumps({"phase": "fill", "fingerprint": fingerprint}))
            return  # the same work again: it finds every file done
        if not os.path.lexists(out):  # between the two renames, or just before the only one
            staging.rename(out)
        _remove(box)


def _remove(box: Path) -> None:
    shutil.rmtree(box, ignore_errors=True)
