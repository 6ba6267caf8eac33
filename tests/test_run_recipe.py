"""The recipe of a run: read, checked, refused with the nearest key; its keys are the commands' options."""

import json
from pathlib import Path

import pytest
import yaml

from wpmerge.errors import WpmergeError
from wpmerge.run_recipe import RunRecipe, json_schema, read_run_recipe, settings_of

LEAST = {
    "base": "owner/base",
    "experts": {"math": "owner/math"},
    "capabilities": {"math": "math"},
    "output": {"directory": "here"},
}
RECIPES = Path(__file__).parents[1] / "recipes"


def write(path: Path, **more: object) -> Path:
    file = path / "recipe.yaml"
    file.write_text(yaml.safe_dump(LEAST | more))
    return file


def refusal(path: Path) -> str:
    with pytest.raises(WpmergeError) as caught:
        read_run_recipe(path)
    return str(caught.value)


def test_the_least_recipe_takes_every_default(tmp_path: Path) -> None:
    recipe = read_run_recipe(write(tmp_path))
    assert recipe == RunRecipe(**LEAST) and recipe.evaluation is None
    assert (recipe.scoring.prompts, recipe.rule.name, recipe.output.shard_size) == (32, "refine", "5GB")


def test_one_value_may_stand_for_a_list(tmp_path: Path) -> None:
    recipe = read_run_recipe(write(tmp_path, scoring={"readout": "divergence"}, evaluation={"tasks": "ifeval"}))
    assert recipe.scoring.readout == ["divergence"]
    assert recipe.evaluation is not None and recipe.evaluation.tasks == ["ifeval"]


@pytest.mark.parametrize(
    ("more", "where", "got", "near"),
    [
        ({"expert": {}}, "top level", "expert", "experts"),
        ({"scoring": {"promts": 3}}, "scoring", "promts", "prompts"),
        ({"rule": {"steps": 2, "tolerence": 1}}, "rule", "tolerence", "tolerance"),
        ({"evaluation": {"skills": {}}}, "evaluation", "skills", "skill"),
        ({"output": {"directory": "x", "shards": "5GB"}}, "output", "shards", None),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(
    tmp_path: Path, more: dict[str, object], where: str, got: str, near: str | None
) -> None:
    said = refusal(write(tmp_path, **more))
    assert f"recipe.yaml: {where}\n" in said and f"got: {got}\n" in said
    assert f"did you mean {near}?" in said if near else "mend: " in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"scoring": {"prompts": 2}}, "scoring.prompts"),
        ({"rule": {"name": "refined"}}, "rule.name"),
        ({"experts": {}}, "experts"),
        ({"vocab": "largest"}, "vocab"),
        ({"scoring": {"max_memory": "plenty"}}, "scoring.max_memory is no size"),
        ({"rule": {"max_memory": "plenty"}}, "rule.max_memory is no size"),
        ({"output": {"directory": "x", "shard_size": "0"}}, "output.shard_size is no size"),
        ({"experts": {"merged": "a"}, "capabilities": {"merged": "math"}}, "no expert may bear the merge's name"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(tmp_path: Path, more: dict[str, object], said: str) -> None:
    assert said in refusal(write(tmp_path, **more))


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for text, said in (
        ("- a\n", "a mapping of keys"),
        ("base: a\nbase: b\n", "'base' occurs twice"),
        ("base: [", "cannot be read"),
        ("merge_method: ties\nmodels: []\n", "wpmerge merge"),
    ):
        file.write_text(text)
        assert said in refusal(file)
    assert "cannot be read" in refusal(tmp_path / "none.yaml")


def test_no_recipe_can_allow_foreign_code(tmp_path: Path) -> None:
    for more in (
        {"trust_remote_code": True},
        {"evaluation": {"confirm_unsafe_code": True}},
        {"evaluation": {"checkers": ["checkers.py"]}},
    ):
        assert "a key that there is none of" in refusal(write(tmp_path, **more))


def test_the_schema_is_the_one_beside_the_recipes() -> None:
    schema = json_schema()
    assert json.loads((RECIPES / "schema.json").read_text()) == schema
    assert schema["additionalProperties"] is False and set(schema["required"]) == set(LEAST)
    sections = schema["$defs"]
    for name in ("Scoring", "MergeRule", "Output", "Judging"):
        properties = sections[name]["properties"]
        assert all(entry.get("description") for entry in properties.values()), name


def test_settings_are_keyword_arguments() -> None:
    recipe = RunRecipe(**LEAST)
    assert settings_of(recipe.output, "directory", "threads") == {
        "dtype": None,
        "shard_size": "5GB",
        "allow_nan": False,
    }
