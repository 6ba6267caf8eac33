"""Proofs on tiny families: grafts are exact at their ends, the artifact is whole, bad input is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from families import write_family, write_prompts
from typer.testing import CliRunner

from wpmerge import cli
from wpmerge.coefficients import make_grouping
from wpmerge.judges import TestPrompt
from wpmerge.models import open_family
from wpmerge.proving import ProveSettings, graft, prove
from wpmerge.readings import ScoreSettings
from wpmerge.scoring import score

QUICK = ProveSettings(shares=(0.1, 0.5), randoms=2, draws=20, roles=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("proving")
    made = write_family(path)
    for number, name in enumerate(("a", "b")):
        write_prompts(path / f"{name}.jsonl", seed=number)
    score(
        base=str(made["base"]),
        experts={name: str(made[name]) for name in ("a", "b")},
        capabilities={name: str(path / f"{name}.jsonl") for name in ("a", "b")},
        out=path / "scores",
        settings=ScoreSettings(
            prompts=8, held_out=6, reference_tokens=5, top=0, sample=0, accept_anchor=True, cross=False
        ),
    )
    return path


def test_a_graft_of_nothing_is_the_base_and_of_all_the_expert(home):
    family = open_family(str(home / "base"), {"a": str(home / "a")})
    base, expert, layout = family.weights[""], family.weights["a"], family.layout
    grouping = make_grouping(layout, "unit")
    for share, whole in ((False, base), (True, expert)):
        units = torch.full((len(grouping.names),), share)
        made = graft(layout, grouping, base, expert, units)
        for index in range(layout.layers):
            assert all(torch.equal(made.layer(index)[k], v) for k, v in whole.layer(index).items())
        assert all(torch.equal(made.outer()[k], v) for k, v in whole.outer().items())
    one = torch.zeros(len(grouping.names), dtype=torch.bool)
    one[grouping.names.index("neuron.1.3")] = True
    made = graft(layout, grouping, base, expert, one).layer(1)
    changed = (made["mlp.up_proj.weight"] != base.layer(1)["mlp.up_proj.weight"]).any(dim=1).nonzero().flatten()
    assert changed.tolist() == [3]
    assert torch.equal(made["self_attn.q_proj.weight"], base.layer(1)["self_attn.q_proj.weight"])


@pytest.fixture(scope="module")
def found(home):
    """The proof that others are compared with."""
    return prove(home / "scores", capabilities=["a"], settings=QUICK)


def test_a_proof_is_whole_and_the_same_again(home, found):
    stored = json.loads((home / "scores-proof" / "proof.json").read_text())
    assert stored["kind"] == "proof" and stored["schema_version"] == 1
    proof = stored["capabilities"]["a"]
    assert set(proof["readouts"]) == {"reference", "anchor"}
    assert set(proof["readouts"]["reference"]["transplant"]["rankings"]) == {
        "linear", "magnitude", "fisher", "activation", "norm", "depth",
    }  # fmt: skip
    for curve in ("transplant", "revert"):
        record = proof["readouts"]["reference"][curve]
        assert record["random"]["count"] == 2 and record["rankings"]["linear"]["linear_ahead"] == 0.0
        assert all(len(each["recovered"]) == 2 for each in record["rankings"].values())
    assert {each["role"] for each in proof["roles"]["units"]} == {"source", "aggregation", "execution"}
    assert not (home / "scores-proof" / "pieces").exists()
    again = prove(home / "scores", out=home / "again", capabilities=["a"], settings=QUICK)
    assert again["capabilities"] == found["capabilities"]


def test_judged_replies(home, monkeypatch):
    """A judge that likes what only the expert says."""
    family = open_family(str(home / "base"), {"a": str(home / "a")})
    from wpmerge.models import continuations

    texts = ["w5 w6 w7", "w9 w12 w33", "w20 w21 w22", "w44 w3 w8"]
    own, others = (continuations(family, name, texts, tokens=5) for name in ("a", ""))
    said = {family.chat.tokenizer.decode(one, skip_special_tokens=True) for one in own}
    assert own != others
    monkeypatch.setattr("wpmerge.proving.judge", lambda item, reply: reply in said)
    tests = [TestPrompt(prompt=text, judge="number", answer=1) for text in texts]
    settings = ProveSettings(shares=(0.5,), randoms=2, draws=10)
    found = prove(home / "scores", out=home / "judged", capabilities=["a"], tests={"a": tests}, settings=settings)
    judged = found["capabilities"]["a"]["readouts"]["judged"]
    assert judged["n"] == 4 and set(judged["transplant"]["rankings"]) == {"linear"}


def test_the_command(home):
    arguments = ["prove", home / "scores", "--share=0.2", "--randoms=1", "--capability=b", "--prompts=4", "--roles"]
    result = CliRunner().invoke(cli.app, [str(each) for each in (*arguments, "--out", home / "table")])
    assert result.exit_code == 0, result.output
    assert "matched random" in result.stdout and "aggregation" in result.stdout
    result = CliRunner().invoke(cli.app, [str(each) for each in (*arguments, "--out", home / "json", "--json")])
    assert json.loads(result.stdout)["capabilities"]["b"]["prompts"] == 4


def test_bad_input_is_refused(home):
    for arguments, said in (
        (["--capability=c"], "no such capability"),
        (["--share=0.5", "--share=0.2"], "increase"),
        (["--model=zzz=/nowhere"], "no such model"),
    ):
        result = CliRunner().invoke(cli.app, ["prove", str(home / "scores"), "--out", str(home / "bad"), *arguments])
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert said in result.stderr
        assert not (home / "bad").exists()
    result = CliRunner().invoke(cli.app, ["prove", str(home / "nothing")])
    assert result.exit_code == 2 and "scores cannot be read" in result.stderr


def test_without_the_prompts_there_is_no_anchor_but_a_proof(home, caplog):
    moved = shutil.move(home / "b.jsonl", home / "b-moved.jsonl")
    try:
        settings = ProveSettings(shares=(0.3,), randoms=1, draws=5)
        found = prove(home / "scores", out=home / "without", capabilities=["b"], settings=settings)
    finally:
        shutil.move(moved, home / "b.jsonl")
    assert set(found["capabilities"]["b"]["readouts"]) == {"reference"}
    assert "no anchor, no roles" in caplog.text


KILLER = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from wpmerge.models import open_family
from wpmerge.proving import ProveSettings, prove

torch.set_num_threads(1)
home, out = Path(sys.argv[1]), Path(sys.argv[1]) / "killed"
settings = ProveSettings(shares=(0.1, 0.5), randoms=2, draws=20, roles=True)
open_family(str(home / "base"), {"a": str(home / "a")})  # what is imported now is not imported by every child

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid

def finished(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def run(check=None):
    def progress(what, done, of):
        if check and "rank stability" in what:
            check()
    prove(home / "scores", out=out, capabilities=["a"], settings=settings, progress=progress)

def pieces():
    return {path.name: path.stat().st_mtime_ns for path in out.parent.glob(".killed.wpmerge/out/pieces/[!.]*")}

resumed, died = [], 0
for least in (1, 4, 9):
    pid = child(run)
    while len(pieces()) < least and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    died += finished(pid) == -signal.SIGKILL
    assert not out.exists(), "half a proof"
    left = {name: when for name, when in pieces().items() if name.endswith((".safetensors", ".json"))}

    def check():
        now = pieces()
        again = [name for name, when in left.items() if "stability" not in name and now.get(name) != when]
        assert not again, f"made again: {again}"

    assert finished(child(lambda: run(check))) == 0
    resumed.append(len(left))
    (out / "proof.json").rename(home / f"resumed-{least}.json")
    out.rmdir()
print(json.dumps({"died": died, "kept": resumed}))
"""


def test_a_killed_proof_goes_on_from_its_curves_and_ends_with_the_same_numbers(home, found):
    command = [sys.executable, "-c", KILLER, str(home)]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["died"] == 3 and counts["kept"][2] >= 8, counts  # of what was counted one may be unfinished
    for least in (1, 4, 9):
        again = json.loads((home / f"resumed-{least}.json").read_text())["capabilities"]
        assert again == json.loads(json.dumps(found["capabilities"]))
    assert not list(home.glob(".killed*"))


def test_pieces_of_other_work_are_not_used(home):
    """Killed, and then asked for with another seed: nothing of the first run is taken."""

    def stop(what, done, of):
        if "rank stability" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prove(home / "scores", out=home / "other", capabilities=["a"], settings=QUICK, progress=stop)
    assert list(home.glob(".other.wpmerge/out/pieces/*curve*"))
    settings = replace(QUICK, seed=1)
    found = prove(home / "scores", out=home / "other", capabilities=["a"], settings=settings)
    fresh = prove(home / "scores", out=home / "fresh", capabilities=["a"], settings=settings)
    assert found["capabilities"] == fresh["capabilities"]


def test_input_that_cannot_be_used_ends_with_one_message(home, tmp_path):
    """Scores that were cut off, of another version, or without finest units; outputs and tests that cannot be used."""

    def refused(*arguments):
        result = CliRunner().invoke(cli.app, ["prove", *map(str, arguments)])
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        return result.stderr

    scores = home / "scores"
    cut = shutil.copytree(scores, tmp_path / "cut")
    (cut / "scores.json").write_text((scores / "scores.json").read_text()[:200])
    assert "scores cannot be read" in refused(cut)
    (cut / "scores.json").write_text(
        (scores / "scores.json").read_text().replace('"schema_version": 2', '"schema_version": 9')
    )
    assert "unknown schema version" in refused(cut)
    assert "exists" in refused(scores, "--out", home / "a")
    assert "is an input" in refused(scores, "--out", scores)
    assert "lies inside an input" in refused(scores, "--out", scores / "proof")
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"prompt": "w5", "reference": "w6"}) + "\n")
    assert "not judged" in refused(scores, "--generate", f"a={plain}")
    assert "cannot be read" in refused(scores, "--generate", f"a={tmp_path / 'none.jsonl'}")
    assert "malformed" in refused(scores, "--generate", "a")
    moved = shutil.move(home / "b", home / "b-moved")
    try:
        assert "error:" in refused(scores, "--capability=b", "--out", tmp_path / "p")
    finally:
        shutil.move(moved, home / "b")
    assert not (tmp_path / "p").exists()
