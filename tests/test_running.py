"""A run: each stage once, skipped when done, redone or refused when a setting changed, nothing of the user's lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import QUICK, write_home, write_prompts

from wpmerge import run_record, running
from wpmerge.errors import WpmergeError
from wpmerge.evaluation import load_evaluation
from wpmerge.merging import merge_recipe
from wpmerge.plan import load_plan
from wpmerge.run_recipe import RunRecipe
from wpmerge.scores import load_scores


def recipe_of(home: Path, **more: Any) -> RunRecipe:
    """Two experts by a fixed scale, judged by an answer."""
    asked = {
        "base": str(home / "base"),
        "experts": {name: str(home / name) for name in "ab"},
        "capabilities": {name: str(home / f"{name}.jsonl") for name in "ab"},
        "scoring": QUICK,
        "rule": {"name": "proportional", "scale": 0.5},
        "output": {"directory": str(home / "run")},
        "evaluation": {
            "tasks": ["local"],
            "task_data": {"local": str(home / "local.jsonl")},
            "skill": {"a": "local/answer_acc"},
            "max_gen_tokens": 4,
        },
    }
    return RunRecipe.model_validate(asked | more)


def carry_out(home: Path, out: Path, *, overwrite: bool = False, **more: Any) -> dict[str, bool]:
    """Stage → whether it was done before."""
    prepared = running.prepare(recipe_of(home, **more), out=out)
    return {each.name: each.before for each in running.carry_out(prepared, overwrite=overwrite)}


def refusal(home: Path, out: Path, *, overwrite: bool = False, **more: Any) -> str:
    with pytest.raises(WpmergeError) as caught:
        carry_out(home, out, overwrite=overwrite, **more)
    return str(caught.value)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family, prompts, documents, and a finished run of them."""
    path = write_home(tmp_path_factory.mktemp("home"))
    rows = [{"prompt": f"w{number} w4", "answer": "w5"} for number in range(3, 9)]
    (path / "local.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert carry_out(path, path / "run") == {"score": False, "fuse": False, "eval": False, "report": False}
    return path


@pytest.fixture
def out(home: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(home / "run", tmp_path / "run")
    return tmp_path / "run"


def written(out: Path) -> dict[str, bytes]:
    """Every file but the record, which says when."""
    return {
        str(file.relative_to(out)): file.read_bytes()
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.name != run_record.RECORD
    }


def test_a_run_ends_in_scores_a_merge_its_recipe_and_an_evaluation(home: Path, tmp_path: Path) -> None:
    out = home / "run"
    assert set(load_scores(out / "scores").experts) == {"a", "b"}
    plan = load_plan(out / "merged")
    assert (plan.rule, plan.granularity) == ("proportional", "unit")
    assert (out / "merged" / "model.safetensors").is_file() and (out / "merged" / "README.md").is_file()
    assert merge_recipe(out / "merged" / "recipe.yml", tmp_path / "again").tensors > 0
    evaluation = load_evaluation(out / "evaluation")
    assert "wpmerge" in (out / "report.html").read_text()
    assert list(evaluation.models) == ["base", "a", "b", "merged"]
    assert (evaluation.base, set(evaluation.skills)) == ("base", {"a"})
    assert sorted(path.name for path in out.iterdir()) == ["evaluation", "merged", "report.html", "run.json", "scores"]


def test_what_is_done_is_skipped(home: Path, out: Path) -> None:
    before = written(out)
    assert carry_out(home, out) == {"score": True, "fuse": True, "eval": True, "report": True}
    assert written(out) == before


def test_where_and_how_fast_does_not_count(home: Path, out: Path) -> None:
    elsewhere = {"directory": "another", "threads": 2}
    rule = {"name": "proportional", "scale": 0.5, "max_memory": "9GB"}
    done = carry_out(home, out, stream=True, output=elsewhere, scoring=QUICK | {"max_memory": "9GB"}, rule=rule)
    assert done == {"score": True, "fuse": True, "eval": True, "report": True}


def test_a_stage_that_is_gone_is_done_again_alone(home: Path, out: Path) -> None:
    shutil.rmtree(out / "evaluation")
    assert carry_out(home, out) == {"score": True, "fuse": True, "eval": False, "report": True}


def test_a_changed_setting_is_refused_by_name_and_redone_if_told(home: Path, out: Path) -> None:
    before = written(out)
    rule = {"name": "proportional", "scale": 0.25}
    said = refusal(home, out, rule=rule)
    assert "rule.scale is 0.25, was 0.5" in said and "merged" in said and "--overwrite" in said
    assert written(out) == before
    assert carry_out(home, out, overwrite=True, rule=rule) == {
        "score": True,
        "fuse": False,
        "eval": False,
        "report": False,
    }
    assert written(out)["scores/scores.safetensors"] == before["scores/scores.safetensors"]
    assert written(out)["merged/model.safetensors"] != before["merged/model.safetensors"]
    assert carry_out(home, out, rule=rule) == {"score": True, "fuse": True, "eval": True, "report": True}


def test_other_prompts_and_other_documents_are_noticed(home: Path, out: Path, tmp_path: Path) -> None:
    other = str(write_prompts(tmp_path / "other.jsonl", seed=7))
    said = refusal(home, out, capabilities={"a": other, "b": str(home / "b.jsonl")})
    assert "capabilities.a differs" in said and "capabilities.b" not in said
    judging = recipe_of(home).evaluation
    assert judging is not None
    (tmp_path / "local.jsonl").write_text((home / "local.jsonl").read_text() * 2)
    changed = judging.model_copy(update={"task_data": {"local": str(tmp_path / "local.jsonl")}})
    said = refusal(home, out, evaluation=changed.model_dump())
    assert "documents.local: evaluated differs" in said and "scores" not in said


def test_a_model_that_changed_is_noticed_and_one_that_moved_is_not(home: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "a", tmp_path / "a")
    places = {"a": str(tmp_path / "a"), "b": str(home / "b")}
    assert carry_out(home, out, experts=places) == {"score": True, "fuse": True, "eval": True, "report": True}
    shutil.copy(home / "b" / "model.safetensors", tmp_path / "a")
    assert "models.a differs" in refusal(home, out, experts=places)


def test_a_file_of_the_users_is_never_replaced(home: Path, out: Path) -> None:
    (out / "merged" / "notes.txt").write_text("mine")
    rule = {"name": "proportional", "scale": 0.25}
    said = refusal(home, out, overwrite=True, rule=rule)
    assert "notes.txt" in said and "move it away" in said
    assert (out / "merged" / "notes.txt").read_text() == "mine"
    (out / "merged" / "notes.txt").unlink()
    (out / "merged" / "README.md").write_text("my own card")
    assert "README.md" in refusal(home, out, overwrite=True, rule=rule)


def test_a_file_of_the_users_outlives_two_interrupts(home: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = {"name": "proportional", "scale": 0.25}
    monkeypatch.setattr(running.api, "fuse", _interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            carry_out(home, out, overwrite=True, rule=rule)
    monkeypatch.undo()
    (out / "merged" / "notes.txt").write_text("mine")
    assert "notes.txt" in refusal(home, out, overwrite=True, rule=rule)
    assert "rule.scale is 0.25, was 0.5" in refusal(home, out, rule=rule)
    (out / "merged" / "notes.txt").unlink()
    redone = {"score": True, "fuse": False, "eval": False, "report": False}
    assert carry_out(home, out, overwrite=True, rule=rule) == redone


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_evaluation_more_is_no_other_run(home: Path, out: Path) -> None:
    """The report, which is soon made again, shows it."""
    judging = recipe_of(home).evaluation
    assert judging is not None
    done = carry_out(home, out, overwrite=True, evaluation=None)
    assert done == {"score": True, "fuse": True, "report": False}
    shutil.rmtree(out / "evaluation")
    done = carry_out(home, out, evaluation=judging.model_dump())
    assert done == {"score": True, "fuse": True, "eval": False, "report": False}


def test_documents_of_one_name_are_told_apart(home: Path, tmp_path: Path) -> None:
    files = {}
    for split in ("evaluated", "train"):
        (tmp_path / split).mkdir()
        files[split] = str(shutil.copy(home / "local.jsonl", tmp_path / split))
    judging = recipe_of(home).evaluation
    assert judging is not None
    judging = judging.model_copy(update={"task_data": {"local": files}})
    before = running._document_hashes(judging)
    Path(files["evaluated"]).write_text("{}\n")
    after = running._document_hashes(judging)
    assert [name for name in before if before[name] != after[name]] == ["local: evaluated"]


def test_what_this_run_did_not_make_is_in_the_way(home: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("x")
    assert "holds something else" in refusal(home, tmp_path / "photos")
    (tmp_path / "file").write_text("x")
    assert "is something else" in refusal(home, tmp_path / "file")
    record = json.loads((out / "run.json").read_text())
    del record["stages"]["fuse"]
    (out / "run.json").write_text(json.dumps(record))
    assert "taken by something that this run did not make" in refusal(home, out, overwrite=True)
    (out / "run.json").write_text("{}")
    assert "of another version" in refusal(home, out)


def test_a_run_killed_before_its_record_takes_what_is_whole(home: Path, out: Path) -> None:
    record = json.loads((out / "run.json").read_text())
    fuse = record["stages"]["fuse"]
    record["stages"]["fuse"] = {**fuse, "files": None, "replaces": None}
    (out / "run.json").write_text(json.dumps(record))
    assert carry_out(home, out) == {"score": True, "fuse": True, "eval": True, "report": True}
    assert json.loads((out / "run.json").read_text())["stages"]["fuse"]["files"] == fuse["files"]
    unfinished = {**fuse, "files": None, "replaces": (out / "merged").stat().st_ino, "replaced": fuse}
    record["stages"]["fuse"] = unfinished  # killed while it replaced the one that still stands there
    (out / "run.json").write_text(json.dumps(record))
    assert "merged" in refusal(home, out)
    assert carry_out(home, out, overwrite=True) == {"score": True, "fuse": False, "eval": True, "report": True}


def test_a_stage_that_fails_leaves_what_was_there(home: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, record = written(out), json.loads((out / "run.json").read_text())["stages"]
    monkeypatch.setattr(running.api, "fuse", _fail)
    assert "no room" in refusal(home, out, overwrite=True, rule={"name": "proportional", "scale": 0.25})
    assert written(out) == before
    assert json.loads((out / "run.json").read_text())["stages"] == record
    monkeypatch.undo()
    assert carry_out(home, out) == {"score": True, "fuse": True, "eval": True, "report": True}


def _fail(*_: object, **__: object) -> None:
    raise WpmergeError("no room")


def test_a_second_run_in_the_same_directory_is_refused(home: Path, out: Path) -> None:
    with run_record.locked(out):
        assert "another run is at work" in refusal(home, out)


def test_bad_input_is_refused_before_a_model_is_opened(home: Path, tmp_path: Path) -> None:
    judging = {"tasks": ["local"], "task_data": {"local": str(tmp_path / "none.jsonl")}}
    for more, said in (
        ({"capabilities": {"a": "math"}}, "expert b has no capability"),
        ({"capabilities": {"a": "maths", "b": "math"}}, "there is no such capability"),
        ({"evaluation": judging}, "evaluation.task_data.local is no file"),
        ({"evaluation": {"skill": {"c": "x/y"}}}, "evaluation.skill names no expert"),
        ({"evaluation": {"batch_size": "banana"}}, "batch"),
        ({"rule": {"name": "select", "density": 5}}, "density is out of range"),
        ({"rule": {"scale": {"zzz": 1.0}}}, "names an unknown expert"),
        ({"rule": {"name": "joint"}, "scoring": QUICK | {"cross": False}}, "needs cross effects"),
        ({"retain": {"a": "math"}}, "a retain set has the name of an expert"),
    ):
        assert said in refusal(home, tmp_path / "out", **more), said
    with pytest.raises(WpmergeError, match="the recipe has no such model"):
        running.prepare(recipe_of(home), models={"c": "x"})
    assert not (tmp_path / "out").exists()


def test_a_splits_file_is_named_by_its_split(home: Path, tmp_path: Path) -> None:
    judging = recipe_of(home).evaluation
    assert judging is not None
    changed = judging.model_copy(update={"task_data": {"local": {"evaluated": str(home / "local.jsonl")}}})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(home).model_dump()))
    shutil.copytree(home / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "evaluation")
    (tmp_path / "run" / "report.html").unlink()
    assert carry_out(home, tmp_path / "run", evaluation=changed.model_dump())["eval"] is False
