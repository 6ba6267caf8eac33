"""``wpmerge run`` as a user gives it: what it prints, how it ends, and what a dry run says and leaves alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import QUICK, write_home
from typer.testing import CliRunner

from wpmerge import cli
from wpmerge.run_recipe import json_schema


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["run", *map(str, arguments)])


STAGES = ("score", "fuse", "report")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_home(tmp_path_factory.mktemp("home"))
    recipe = {
        "base": str(path / "base"),
        "experts": {name: str(path / name) for name in "ab"},
        "capabilities": {name: str(path / f"{name}.jsonl") for name in "ab"},
        "scoring": QUICK,
        "rule": {"name": "uniform", "scale": 0.5},
        "output": {"directory": str(path / "run")},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return path


def test_a_dry_run_then_a_run_then_the_same_again(home: Path) -> None:
    before = sorted(home.rglob("*"))
    result = run(home / "recipe.yaml", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    dry = json.loads(result.stdout)
    assert {stage["stage"]: stage["state"] for stage in dry["stages"]} == dict.fromkeys(STAGES, "to do")
    assert not any(model["download"] for model in dry["models"].values()) and dry["download_bytes"] == 0
    assert sorted(home.rglob("*")) == before

    result = run(home / "recipe.yaml", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(each["stage"], each["done_before"]) for each in found["stages"]] == [(name, False) for name in STAGES]
    assert Path(found["report"]).is_file()
    assert found["rule"] == "uniform" and Path(found["recipe"]).is_file() and "evaluation" not in found
    written = next(stage for stage in dry["stages"] if stage["stage"] == "fuse")["written_bytes"]
    assert (Path(found["merged"]) / "model.safetensors").stat().st_size == pytest.approx(written, rel=0.2)

    result = run(home / "recipe.yaml")
    assert result.exit_code == 0 and result.stdout.count("done before") == 3
    shown = run(home / "recipe.yaml", "--dry-run")
    assert shown.exit_code == 0 and "nothing was downloaded, run or written" in shown.stdout


def test_the_schema_is_printed() -> None:
    result = run("--schema")
    assert result.exit_code == 0 and json.loads(result.stdout) == json_schema()


def test_bad_input_is_one_message_and_exit_code_2(home: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("base: a\nexpert: b\n")
    for arguments, said in (
        ([], "needs a recipe"),
        ([tmp_path / "none.yaml"], "cannot be read"),
        ([tmp_path / "bad.yaml"], "did you mean experts?"),
        ([home / "recipe.yaml", "--model", "c=x"], "the recipe has no such model"),
        ([home / "recipe.yaml", "--dry-run", "--model", "a=x/y/z"], "no such checkpoint directory"),
        ([home / "recipe.yaml", "--out", home], "holds something else"),
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert said in result.stderr and "Traceback" not in result.stderr
