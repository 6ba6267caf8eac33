import errno
import os
import resource
import subprocess
import sys
import threading

import pytest
import torch

from wpmerge.errors import CheckpointError, OutputError
from wpmerge.output import check_output, check_space, mark, output_directory, work_directory, write_file


def names(path):
    return sorted(child.name for child in path.iterdir())


def fill(directory, text="new"):
    write_file(directory / "merge.json", text)


def test_appears_only_when_whole(tmp_path):
    out = tmp_path / "out"
    with output_directory(out) as directory:
        fill(directory)
        assert not out.exists()
        assert directory.parent.parent == tmp_path
    assert names(tmp_path) == ["out"]
    assert names(out) == ["merge.json"]
    assert (out / "merge.json").read_text() == "new"


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with output_directory(tmp_path / "out") as directory:
            fill(directory)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "merge.json").stat().st_mode & 0o777 == 0o640


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), output_directory(tmp_path / "out", fingerprint="f") as directory:
        fill(directory)
        1 / 0  # noqa: B018
    assert names(tmp_path) == []


def test_memory_that_runs_out_leaves_what_is_finished(tmp_path):
    for begin in (output_directory, work_directory):
        with pytest.raises(RuntimeError), begin(tmp_path / "out", fingerprint="same") as directory:
            fill(directory, "first")
            torch.empty(1 << 60)
        with begin(tmp_path / "out", fingerprint="same") as directory:
            assert (directory / "merge.json").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_parents_are_made(tmp_path):
    with output_directory(tmp_path / "a" / "b" / "out") as directory:
        fill(directory)
    assert (tmp_path / "a" / "b" / "out" / "merge.json").is_file()


def test_existing_is_refused_then_swapped_whole(tmp_path):
    out = tmp_path / "out"
    with output_directory(out) as directory:
        fill(directory, "old")
        write_file(directory / "stale.index.json", "old")
    with pytest.raises(OutputError, match="--overwrite"), output_directory(out):
        pytest.fail("entered")
    with output_directory(out, overwrite=True) as directory:
        fill(directory)
        assert (out / "merge.json").read_text() == "old"
    assert names(out) == ["merge.json"]
    assert (out / "merge.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_failed_overwrite_keeps_the_old(tmp_path):
    out = tmp_path / "out"
    with output_directory(out) as directory:
        fill(directory, "old")
    with pytest.raises(ZeroDivisionError), output_directory(out, overwrite=True) as directory:
        fill(directory)
        1 / 0  # noqa: B018
    assert (out / "merge.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_somebody_elses_directory_is_never_replaced(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="not an output"), output_directory(home, overwrite=True):
        pytest.fail("entered")
    assert (home / "thesis.tex").read_text() == "years"
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(home)
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="not a directory"):
            check_output(tmp_path / name, inputs=[], overwrite=True)


@pytest.mark.parametrize(
    ("out", "relation"),
    [("models/base", "is"), ("models", "contains"), ("models/base/out", "lies inside"), ("link/base", "is")],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_is_never_the_output(tmp_path, out, relation, overwrite):
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (base / "merge.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "models")
    with pytest.raises(OutputError, match=f"the output {relation} an input"):
        check_output(tmp_path / out, inputs=[tmp_path / "other", base], overwrite=overwrite)
    check_output(tmp_path / "models2", inputs=[base], overwrite=overwrite)


def test_a_killed_run_is_resumed_by_the_same_work_only(tmp_path):
    out = tmp_path / "out"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from wpmerge.output import output_directory, write_file\n"
        "with output_directory(Path(sys.argv[1]), fingerprint='same') as d:\n"
        "    write_file(d / 'shard', 'done')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    for fingerprint, found in (("same", ["shard"]), ("other", []), ("", [])):
        killed = subprocess.run([sys.executable, "-c", code, str(out)], check=False)
        assert killed.returncode == -9
        assert not out.exists()
        with pytest.raises(ZeroDivisionError), output_directory(out, fingerprint=fingerprint) as directory:
            assert names(directory) == found
            1 / 0  # noqa: B018
        assert names(tmp_path) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_during_the_swap_loses_nothing(tmp_path, exchange):
    """Killed at every rename of an overwrite in turn: the name always holds one whole directory after a rerun."""
    code = (
        "import os, signal, sys; from pathlib import Path; import wpmerge.output as o\n"
        "left = [int(sys.argv[2])]; rename = Path.rename\n"
        "def dying(self, target):\n"
        "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    left[0] -= 1\n"
        "    return rename(self, target)\n"
        "swap = o._exchange\n"
        "def dying_swap(a, b):\n"
        "    if sys.argv[3] == 'False': return False\n"
        "    done = swap(a, b)\n"
        "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return done\n"
        "with o.output_directory(Path(sys.argv[1]), overwrite=True, fingerprint='f') as d:\n"
        "    o.write_file(d / 'merge.json', 'new')\n"
        "    Path.rename, o._exchange = dying, dying_swap"
    )
    out, deaths = tmp_path / "out", 0
    for moment in range(5):
        out.mkdir()
        (out / "merge.json").write_text("old")
        done = subprocess.run([sys.executable, "-c", code, str(out), str(moment), str(exchange)], check=False)
        deaths += done.returncode == -9
        with pytest.raises(OutputError, match="exists"), output_directory(out, fingerprint="f"):
            pytest.fail("entered")
        assert (out / "merge.json").read_text() in ("old", "new")
        with output_directory(out, overwrite=True, fingerprint="f") as directory:
            fill(directory, "newer")
        assert (out / "merge.json").read_text() == "newer"
        assert names(tmp_path) == ["out"]
        (out / "merge.json").unlink()
        out.rmdir()
    assert deaths >= 2


def test_two_runs_do_not_share_an_output(tmp_path):
    out, inside, leave = tmp_path / "out", threading.Event(), threading.Event()

    def first():
        with output_directory(out, fingerprint="f") as directory:
            fill(directory)
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)
    with pytest.raises(OutputError, match="another run"), output_directory(out, fingerprint="f"):
        pytest.fail("entered")
    leave.set()
    thread.join()
    assert (out / "merge.json").read_text() == "new"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB; mounting one takes the rights to."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_foreseen(small_disk):
    check_space(small_disk / "not" / "yet" / "out", total=2**19)
    with pytest.raises(OutputError, match="not enough disk space") as caught:
        check_space(small_disk / "out", total=2**21)
    assert caught.value.expected == "2,097,152 bytes"
    assert caught.value.where == small_disk / "out"


def test_a_disk_that_fills_up_leaves_nothing(small_disk):
    with pytest.raises(OutputError, match="No space left"), output_directory(small_disk / "out") as directory:
        write_file(directory / "big", bytes(2**21))
    assert names(small_disk) == []


def test_the_file_size_limit_is_foreseen(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        check_space(tmp_path / "out", total=2**21, largest=2**20)
        with pytest.raises(OutputError, match="file-size limit"):
            check_space(tmp_path / "out", total=2**21, largest=2**20 + 1)
        with pytest.raises(OutputError, match="File too large"), output_directory(tmp_path / "out") as directory:
            write_file(directory / "big", bytes(2**21))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_same_work_resumes_after_a_kill_just_before_the_swap(tmp_path, overwrite):
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "merge.json").write_text("old")
    code = (
        "import os, signal, sys; from pathlib import Path; import wpmerge.output as o\n"
        "def die(*paths): os.kill(os.getpid(), signal.SIGKILL)\n"
        "with o.output_directory(Path(sys.argv[1]), overwrite=True, fingerprint='same') as d:\n"
        "    o.write_file(d / 'merge.json', 'new'); o.write_file(d / 'shard', 'done')\n"
        "    rename = Path.rename\n"
        "    Path.rename = lambda self, to: die() if self.name == 'out' else rename(self, to)\n"
        "    o._exchange = die"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out)], check=False).returncode == -9
    assert out.exists() == overwrite
    with output_directory(out, overwrite=overwrite, fingerprint="same") as directory:
        assert names(directory) == ["merge.json", "shard"]
        assert not overwrite or (out / "merge.json").read_text() == "old"
    assert names(out) == ["merge.json", "shard"]
    assert names(tmp_path) == ["out"]


def test_work_is_kept_where_the_output_cannot_be_written_and_removed_after_a_fault(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="No space left"), work_directory(out, fingerprint="f") as work:
        (work / "part").write_text("done")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(KeyboardInterrupt), work_directory(out, fingerprint="f") as work:
        assert names(work) == ["part"]
        raise KeyboardInterrupt
    with (
        pytest.raises(OutputError, match="another run"),
        work_directory(out, fingerprint="f") as work,
        work_directory(out, fingerprint="f"),
    ):
        pytest.fail("entered")
    with pytest.raises(CheckpointError), work_directory(out, fingerprint="f") as work:
        raise CheckpointError("a merged tensor has values that are not finite", mend="--allow-nan")
    with pytest.raises(ZeroDivisionError), work_directory(out, fingerprint="f") as work:
        assert names(work) == ["part"]
        1 / 0  # noqa: B018
    assert names(tmp_path) == []
    with work_directory(out, fingerprint="f") as work:
        assert names(work) == []
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "files", [["config.json"], ["recipe.yml"], ["config.json", "recipe.yml", "mergekit_config.yml"]]
)
def test_a_model_or_recipe_of_somebody_else_is_never_replaced(tmp_path, files):
    for name in files:
        (tmp_path / "home" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "home" / name).write_text("{}")
    with pytest.raises(OutputError, match="not an output"):
        check_output(tmp_path / "home", inputs=[], overwrite=True)
    mark(tmp_path / "home", "a merge that mergekit made")
    check_output(tmp_path / "home", inputs=[], overwrite=True)


def test_a_place_where_nothing_can_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="it is no directory"):
        check_output(tmp_path / "file" / "deep" / "out", inputs=[], overwrite=False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="it may not be written"):
        check_output(tmp_path / "new" / "out", inputs=[], overwrite=False)
