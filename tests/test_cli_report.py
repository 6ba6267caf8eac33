"""`wpmerge report` on what the other commands wrote, as a user gives it."""

import json
from dataclasses import replace

import pytest
from families import write_family, write_prompts
from reports import data_of, made_evaluation
from typer.testing import CliRunner

from wpmerge import cli
from wpmerge.evaluation import Skill, to_json
from wpmerge.fusing import FuseSettings, fuse
from wpmerge.proving import ProveSettings, prove
from wpmerge.readings import ScoreSettings
from wpmerge.scores import load_scores
from wpmerge.scoring import score


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny family, scored, fused and proved for real; and an evaluation of its models."""
    path = tmp_path_factory.mktemp("family")
    made = write_family(path)
    for number, name in enumerate(("a", "b")):
        write_prompts(path / f"{name}.jsonl", seed=number)
    settings = ScoreSettings(
        prompts=8, held_out=6, reference_tokens=5, top=3, sample=4, verify_prompts=2, accept_anchor=True
    )
    score(
        base=str(made["base"]),
        experts={name: str(made[name]) for name in ("a", "b")},
        capabilities={name: str(path / f"{name}.jsonl") for name in ("a", "b")},
        out=path / "scores",
        settings=settings,
    )
    fuse(path / "scores", path / "plan", settings=FuseSettings(rule="proportional", scales={"": 0.5}), plan_only=True)
    prove(path / "scores", settings=ProveSettings(shares=(0.1, 0.5), randoms=2, draws=10, roles=True))
    evaluation = made_evaluation(load_scores(path / "scores"))
    models = {name: replace(each, source=str(made.get(name, name))) for name, each in evaluation.models.items()}
    (path / "evaluation").mkdir()
    (path / "evaluation" / "evaluation.json").write_text(to_json(replace(evaluation, models=models)))
    return path


def run(*arguments):
    return CliRunner().invoke(cli.app, ["report", *(str(each) for each in arguments)])


def options(home):
    names = {"plan": "plan", "evaluation": "evaluation", "proof": "scores-proof"}
    return [part for name, where in names.items() for part in (f"--{name}", home / where)]


def test_everything(home, tmp_path):
    result = run(home / "scores", *options(home), "--out", tmp_path / "r.html", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["out"] == str(tmp_path / "r.html") and said["bytes"] == (tmp_path / "r.html").stat().st_size < 5_000_000
    assert {"scores-head-reference", "coefficients-neuron", "proof-reference", "retention"} <= set(said["figures"])
    assert said["remarks"] == []
    found = data_of((tmp_path / "r.html").read_text())["lookup"]
    # why a coefficient: the sentence of `fuse --explain`, word for word
    arguments = [
        "fuse",
        home / "scores",
        "--rule=proportional",
        "--scale=0.5",
        "--plan-only",
        "--explain=head.1.2",
        "--json",
    ]
    fused = CliRunner().invoke(cli.app, [str(each) for each in (*arguments, "--out", tmp_path / "again")])
    assert found["why"]["head.1.2"] == json.loads(fused.stdout)["explanations"]["head.1.2"]
    scores = load_scores(home / "scores")
    assert set(found["why"]) == set(found["units"]) and found["kinds"][0]["units"] == scores.counts["head"]
    proof = json.loads((home / "scores-proof" / "proof.json").read_text())
    chance = proof["capabilities"]["a"]["readouts"]["reference"]["transplant"]["random"]
    low, high = chance["recovered_range"]
    assert all(a <= b <= c for a, b, c in zip(low, chance["recovered"], high, strict=True))


def test_text_writes_no_file(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(home / "scores", *options(home), "--text")
    assert result.exit_code == 0, result.output
    assert "a: reference" in result.stdout and "plan: rule proportional" in result.stdout
    assert "matched random" in result.stdout and "retention" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_unit_is_explained_from_the_plan(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(home / "scores", "--plan", home / "plan", "--explain", "neuron.2.7", "--json")
    assert result.exit_code == 0, result.output
    (first, second) = json.loads(result.stdout)["explanations"]["neuron.2.7"]
    assert first.startswith("a gets ") and " at neuron.2.7 " in first and "proportional" in second
    assert list(tmp_path.iterdir()) == []
    for arguments, said in ((["--explain", "neuron.2.7"], "no plan"), (["--explain", "lion"], "no such unit")):
        plan = ["--plan", home / "plan"] if said == "no such unit" else []
        result = run(home / "scores", *plan, *arguments)
        assert result.exit_code == 2 and said in result.stderr, result.output


def test_the_default_place(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(home / "scores")
    assert result.exit_code == 0 and "report.html" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    again = run(home / "scores")
    assert (again.exit_code, again.stdout) == (2, "") and "--overwrite" in again.stderr
    assert run(home / "scores", "--overwrite").exit_code == 0


def test_bad_input_is_refused_and_nothing_is_written(home, tmp_path):
    evaluation = made_evaluation(load_scores(home / "scores"))
    odd = replace(evaluation, skills={"x": Skill(expert="merge", metric="ifeval/inst_level_strict_acc")})
    (tmp_path / "evaluation.json").write_text(to_json(odd))
    for arguments, said in (
        ([home / "nothing"], "scores cannot be read"),
        ([home / "scores", "--plan", home / "scores"], "a plan cannot be read"),
        ([home / "scores", "--proof", home / "plan"], "a proof cannot be read"),
        ([home / "scores", "--bench", home / "plan"], "a benchmark cannot be read"),
        ([home / "scores", "--evaluation", tmp_path], "other models or skills than the scores"),
    ):
        result = run(*arguments, "--out", tmp_path / "bad.html")
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert said in result.stderr and "Traceback" not in result.stderr
        assert not (tmp_path / "bad.html").exists()
