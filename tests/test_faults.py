"""Merges under faults made for real: kills, full disks, limits, hostile files, random bytes.

WPMERGE_KILLS and WPMERGE_MUTATIONS set the counts; ``make soak`` runs 200 and 10,000.
"""

import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from checkpoints import CONFIG, family, llama_shapes, random_weights, write_checkpoint

from wpmerge.checkpoint import open_checkpoint
from wpmerge.errors import CheckpointError, OutputError, WpmergeError
from wpmerge.fused import FusedMerge
from wpmerge.merging import merge_recipe

KILLS = int(os.environ.get("WPMERGE_KILLS", "10"))
MUTATIONS = int(os.environ.get("WPMERGE_MUTATIONS", "500")) // 2  # in each kind of loops
UP = "model.layers.0.mlp.up_proj.weight"


def write_recipe(path, made, method="task_arithmetic", **changes):
    parameters = {"weight": 0.5} | ({} if method in ("task_arithmetic", "linear") else {"density": 0.5})
    document = {
        "models": [{"model": str(made[name]), "parameters": dict(parameters)} for name in made if name != "base"],
        "merge_method": method,
        "base_model": str(made["base"]),
    }
    path.write_text(yaml.safe_dump(document | changes))
    return path


KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
import wpmerge.fused, wpmerge.jobs
from wpmerge.merging import merge_recipe

torch.set_num_threads(1)
place, kills, method = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
wpmerge.jobs.BLOCK_ELEMENTS = 64
if sys.argv[4] == "compiled":
    from wpmerge import kernels
    wpmerge.fused.WORTH_COMPILING = 0
    kernels.prepare(ties=True)
recipe, out = place / f"{method}.yml", place / "outputs" / "out"
chance = random.Random(kills)

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid

def run(**settings):
    merge_recipe(recipe, out, shard_bytes=3000, **settings)

def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}

def finished(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

times = []
for _ in range(3):
    began = time.perf_counter()
    assert finished(child(run)) == 0
    times.append(time.perf_counter() - began)
    expected = contents(out)
    shutil.rmtree(out)
duration = min(times)
died = resumed = 0
for number in range(kills):
    overwrite = number % 3 == 2
    if overwrite:
        out.mkdir()
        (out / "merge.json").write_text("old")
    pid = child(lambda: run(overwrite=overwrite, threads=1 + number % 2))
    time.sleep(chance.uniform(0.1, 1) * duration)
    os.kill(pid, signal.SIGKILL)
    died += finished(pid) == -signal.SIGKILL
    if out.exists() and contents(out) != expected:
        assert overwrite and contents(out) == {"merge.json": b"old"}, f"kill {number}: half an output"
    left = {file.name: file.stat().st_mtime_ns for file in out.parent.glob(".out.wpmerge/out/*.safetensors")}
    whole = out.exists() and contents(out) == expected
    assert finished(child(lambda: run(overwrite=overwrite or whole))) == 0, f"kill {number}: the rerun failed"
    assert contents(out) == expected, f"kill {number}: other bytes"
    assert [path.name for path in out.parent.iterdir()] == ["out"], f"kill {number}: strays"
    if not whole:
        again = [name for name, time_ns in left.items() if (out / name).stat().st_mtime_ns != time_ns]
        assert not again, f"kill {number}: made again: {again}"
        resumed += bool(left)
    shutil.rmtree(out)
print(json.dumps({"died": died, "resumed": resumed, "duration": duration}))
"""


@pytest.mark.parametrize(
    ("method", "path"),
    [("task_arithmetic", "array"), ("task_arithmetic", "compiled"), ("ties", "torch"), ("ties", "compiled")],
)
def test_killed_at_random_moments(tmp_path, method, path):
    """The output is absent or complete, a rerun resumes, gives the same bytes, and leaves no strays."""
    made = family(tmp_path / "models")
    write_recipe(tmp_path / f"{method}.yml", made, method)
    (tmp_path / "outputs").mkdir()
    kills = -(-KILLS // 4)
    command = [sys.executable, "-c", KILLER, str(tmp_path), str(kills), method, path]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["died"] >= kills // 3, counts
    assert counts["resumed"] >= kills // 20, counts


@pytest.fixture
def disk(tmp_path):
    """A small file system."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(params=["torch", "array", "compiled"])
def loops(request, monkeypatch):
    """Merges in torch, in NumPy (task arithmetic), and by compiled loops (otherwise for large merges alone)."""
    if request.param == "torch":
        monkeypatch.setattr("wpmerge.streaming.load_kernels", lambda jobs: None)
    if request.param == "compiled":
        monkeypatch.setattr("wpmerge.fused.WORTH_COMPILING", 0)
    return request.param


@pytest.mark.usefixtures("loops")
def test_a_disk_that_fills_up_while_a_merge_writes(tmp_path, disk, monkeypatch):
    """The forecast is switched off, as another process may take the space after it."""
    made = {
        name: write_checkpoint(tmp_path / name, {"x": torch.ones(400, 500, dtype=torch.bfloat16) * i})
        for i, name in enumerate(("base", "e0"))
    }
    recipe = write_recipe(tmp_path / "r.yml", made)
    with pytest.raises(OutputError, match="not enough disk space"):
        merge_recipe(recipe, disk / "out")
    monkeypatch.setattr("wpmerge.writing.check_space", lambda *args, **settings: None)
    with pytest.raises(OutputError, match="No space left") as caught:
        merge_recipe(recipe, disk / "out")
    assert caught.value.where == disk / "out"
    assert "bytes" in caught.value.expected
    assert not list(disk.iterdir())


@pytest.mark.usefixtures("loops")
def test_the_file_size_limit(tmp_path, monkeypatch):
    made = {
        name: write_checkpoint(tmp_path / name, {"x": torch.ones(400, 500, dtype=torch.bfloat16) * i})
        for i, name in enumerate(("base", "e0"))
    }
    recipe, place = write_recipe(tmp_path / "r.yml", made), tmp_path / "place"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, before[1]))
    try:
        with pytest.raises(OutputError, match="file-size limit") as caught:
            merge_recipe(recipe, place / "out")
        assert caught.value.where == place / "out"
        monkeypatch.setattr("wpmerge.writing.check_space", lambda *args, **settings: None)
        with pytest.raises(OutputError, match="File too large"):
            merge_recipe(recipe, place / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not place.exists() or not list(place.iterdir())


class _Bomb:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def rewrite_header(path, change):
    """Change a safetensors header in place; the data stays."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = change(raw[8 : 8 + length].decode())
    path.write_bytes(len(header.encode()).to_bytes(8, "little") + header.encode() + raw[8 + length :])


def edit_header(name, **changes):
    def change(text):
        header = json.loads(text)
        header[name] |= changes
        return json.dumps(header)

    return change


def weights(made, name="e1"):
    return made[name] / "model.safetensors"


def malicious(made):
    weights(made).unlink()
    torch.save({"x": _Bomb()}, made["e1"] / "pytorch_model.bin", pickle_module=pickle)


def remote_code(made):
    config = made["e1"] / "tokenizer_config.json"
    config.write_text(json.dumps({"auto_map": {"AutoTokenizer": "evil.Tokenizer"}}))


def edit_index(change):
    def apply(made):
        shutil.rmtree(made["e1"])
        write_checkpoint(made["e1"], random_weights(7, llama_shapes()), shards=2)
        index = made["e1"] / "model.safetensors.index.json"
        document = json.loads(index.read_text())
        change(document["weight_map"], made)
        index.write_text(json.dumps(document))

    return apply


SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
OTHER = dict(zip(SHARDS, reversed(SHARDS), strict=True))


def long_header(made):
    rewrite_header(weights(made), lambda text: text + " " * 100 * 2**20)


def without_shard(made):
    edit_index(lambda mapping, made: None)(made)
    (made["e1"] / "model-00002-of-00002.safetensors").unlink()


def twice(made):
    rewrite_header(
        weights(made), lambda text: text[:-1].rstrip() + ',"' + UP + '":' + json.dumps(json.loads(text)[UP]) + "}"
    )


def nan_at_weight_zero(made):
    tensors = safetensors.torch.load_file(weights(made))
    tensors[UP][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, weights(made))


HOSTILE = {
    "malicious pickle": (malicious, "nothing in it was executed"),
    "remote code": (remote_code, "asks to run code"),
    "offsets that lie": (lambda m: rewrite_header(weights(m), edit_header(UP, data_offsets=[0, 768])), "overlaps|gap"),
    "offsets past the end": (
        lambda m: rewrite_header(weights(m), edit_header("model.norm.weight", data_offsets=[10**9, 10**9 + 32])),
        "ends before tensor",
    ),
    "shape that lies": (lambda m: rewrite_header(weights(m), edit_header(UP, shape=[24, 17])), "contradicts itself"),
    "negative shape": (lambda m: rewrite_header(weights(m), edit_header(UP, shape=[-24, -16])), "malformed header"),
    "huge shape": (lambda m: rewrite_header(weights(m), edit_header(UP, shape=[2**62, 2**62])), "contradicts itself"),
    "unknown dtype": (lambda m: rewrite_header(weights(m), edit_header(UP, dtype="F8_E4M3")), "unsupported dtype"),
    "a name twice": (twice, "malformed header"),
    "a name that is no text": (
        lambda m: rewrite_header(weights(m), lambda text: text.replace("model.norm", "\\ud800", 1)),
        "malformed header",
    ),
    "100 MB of header": (long_header, "header too large"),
    "index outside": (edit_index(lambda mapping, made: mapping.update({UP: "../base/model.safetensors"})), "outside"),
    "index at the wrong shard": (
        edit_index(lambda mapping, made: mapping.update({UP: OTHER[mapping[UP]]})),
        "which it does not",
    ),
    "a shard missing": (without_shard, "a shard is missing"),
    "nan at weight zero": (nan_at_weight_zero, "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_input_is_refused_before_any_output(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    made = family(tmp_path / "models")
    recipe = write_recipe(tmp_path / "r.yml", made)
    change, complaint = HOSTILE[fault]
    change(made)
    if fault == "nan at weight zero":
        recipe.write_text(recipe.read_text().replace("0.5", "0.0"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=complaint) as caught:
        merge_recipe(recipe, tmp_path / "out")
    assert str(made["e1"]) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_insisted_on(tmp_path):
    made = family(tmp_path / "models")
    recipe = write_recipe(tmp_path / "r.yml", made)
    nan_at_weight_zero(made)
    remote_code(made)
    merge_recipe(recipe, tmp_path / "out", allow_nan=True, trust_remote_code=True)
    merged = open_checkpoint(tmp_path / "out", trust_remote_code=True)
    assert torch.isnan(merged.load(UP)).sum() == 1
    assert all(merged.load(name).isfinite().all() for name in merged.tensors if name != UP)


def mutate(raw, chance):
    """One random change to some bytes: flips, cuts, repeats, junk, and numbers that are too large."""
    raw, place = bytearray(raw), chance.randrange(max(1, len(raw)))
    kind = chance.randrange(6)
    if kind == 0 and raw:
        raw[place] ^= 1 << chance.randrange(8)
    elif kind == 1 and raw:
        raw[place] = chance.randrange(256)
    elif kind == 2:
        del raw[place : place + chance.randrange(1, 40)]
    elif kind == 3:
        raw[place:place] = raw[max(0, place - chance.randrange(1, 60)) : place]
    elif kind == 4:
        raw[place:place] = chance.choice(
            [b"{", b"]", b'"', b"null", b"\x00", b"[[[[", b": ", b"\n- ", b"\\ud800", b"&a *a"]
        )
    else:
        digits = [i for i, byte in enumerate(raw) if 48 <= byte <= 57]
        if digits:
            at = chance.choice(digits)
            raw[at : at + 1] = chance.choice([b"-1", b"1e99", b"99999999999999999999", b"NaN", b"true", b"0.5"])
    return bytes(raw)


def test_random_bytes_never_crash(tmp_path, monkeypatch, loops):
    """Headers, indexes, configurations, tokenizers and recipes, mutated: an error that names the fault, or a merge."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.chdir(tmp_path)
    shapes = llama_shapes(1)
    config = CONFIG | {"num_hidden_layers": 1}
    made = {
        "base": write_checkpoint(tmp_path / "base", random_weights(0, shapes), config=config),
        "e0": write_checkpoint(tmp_path / "e0", random_weights(1, shapes), config=config, shards=2),
    }
    method = "task_arithmetic" if loops == "array" else "ties"
    changes = {"dtype": "float32"} if loops == "torch" else {}  # the others know bfloat16 alone
    recipe = write_recipe(tmp_path / "r.yml", made, method, parameters={"lambda": 1.5}, **changes)
    fused: list[bool] = []
    write = FusedMerge.write

    def counted(*arguments: Any) -> int | None:
        fused.append(True)
        return write(*arguments)

    monkeypatch.setattr(FusedMerge, "write", counted)
    files = [
        recipe, recipe, made["base"] / "model.safetensors", made["e0"] / "model-00001-of-00002.safetensors",
        made["e0"] / "model.safetensors.index.json", made["e0"] / "config.json", made["e0"] / "tokenizer.json",
        made["base"] / "config.json",
    ]  # fmt: skip
    chance, refused, out = random.Random(MUTATIONS), 0, tmp_path / "out"
    before = sorted(path.name for path in tmp_path.iterdir())
    for number in range(MUTATIONS):
        file = chance.choice(files)
        raw = file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little") if file.suffix == ".safetensors" else len(raw)
        changed = raw
        for _ in range(chance.randrange(1, 4)):
            changed = mutate(changed[:end], chance) + raw[end:]
        file.write_bytes(changed)
        try:
            merge_recipe(recipe, out, sync=False)
            shutil.rmtree(out)
        except WpmergeError as error:
            refused += 1
            assert str(error).isprintable() or "\n" in str(error)
        except Exception as error:
            raise AssertionError(f"mutation {number} of {file.name}: {changed[:end]!r}") from error
        finally:
            file.write_bytes(raw)
        assert sorted(path.name for path in tmp_path.iterdir()) == before, f"mutation {number}"
    assert refused > MUTATIONS // 2
    assert bool(fused) is (loops != "torch")


def test_a_configuration_that_states_endless_layers_takes_no_time(tmp_path):
    """Found by random bytes: the layers that it has are merged, as far as they go."""
    made = family(tmp_path / "models")
    recipe = write_recipe(tmp_path / "r.yml", made)
    merge_recipe(recipe, tmp_path / "before")
    for path in made.values():
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**20}))
    merge_recipe(recipe, tmp_path / "after")
    files = [tmp_path / name / "model.safetensors" for name in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_recipe_that_explodes_is_refused_quickly(tmp_path):
    lines = ["a0: &a0 [1,1]"] + [f"a{i}: &a{i} [*a{i - 1},*a{i - 1}]" for i in range(1, 60)]
    (tmp_path / "r.yml").write_text("\n".join([*lines, "merge_method: linear", "models: *a59"]))
    code = "import sys; from pathlib import Path; from wpmerge.yaml_recipe import read_yaml_recipe\ntry: read_yaml_recipe(Path(sys.argv[1]))\nexcept Exception as e: print(type(e).__name__)"  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "r.yml")], timeout=60, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "RecipeError"
    assert Path(tmp_path / "r.yml").exists()
