"""Every recipe of recipes/ loads, and says offline what it would take, on configurations of the models' real shapes.

The sizes are those of the models' published configurations; the numbers of parameters are what their weights hold
(arXiv:2307.09288, arXiv:2407.21783, arXiv:2412.15115, arXiv:2310.06825, and docs/log.md for SmolLM2).
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hubcache import hub_cache
from typer.testing import CliRunner

from wpmerge import cli
from wpmerge.run_recipe import read_run_recipe
from wpmerge.sources import parameters
from wpmerge.yaml_recipe import read_yaml_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def config(kind: str, hidden: int, layers: int, heads: int, groups: int, inner: int, rows: int, **more: Any) -> Any:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": inner,
        "vocab_size": rows,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    } | more


LLAMA2 = config("llama", 5120, 40, 40, 40, 13824, 32000, torch_dtype="float16")
LLAMA31 = config("llama", 4096, 32, 32, 8, 14336, 128256)
QWEN25 = config("qwen2", 3584, 28, 28, 4, 18944, 152064)
MISTRAL = config("mistral", 4096, 32, 32, 8, 14336, 32000)
SMOLLM2 = config("llama", 576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True)
ADAPTER = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]}
HUB = {
    "meta-llama/Llama-2-13b-hf": LLAMA2,
    "WizardLMTeam/WizardLM-13B-V1.2": LLAMA2,
    "WizardLMTeam/WizardMath-13B-V1.0": {**LLAMA2, "vocab_size": 32001},
    "layoric/llama-2-13b-code-alpaca": LLAMA2,
    "meta-llama/Llama-3.1-8B": LLAMA31,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA31,
    "nvidia/OpenMath2-Llama3.1-8B": LLAMA31,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": LLAMA31,
    "Qwen/Qwen2.5-7B": QWEN25,
    "Qwen/Qwen2.5-7B-Instruct": QWEN25,
    "Qwen/Qwen2.5-Coder-7B-Instruct": QWEN25,
    "Qwen/Qwen2.5-Math-7B-Instruct": QWEN25,
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "predibase/gsm8k": ADAPTER,
    "predibase/magicoder": ADAPTER,
}


def dry_run(recipe: Path, *more: object) -> dict[str, Any]:
    arguments = ["run", str(recipe), "--dry-run", "--json", *map(str, more)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_shapes_are_those_of_the_real_models() -> None:
    counts = [parameters(each) for each in (LLAMA2, LLAMA31, QWEN25, MISTRAL, SMOLLM2)]
    assert counts == [13_015_864_320, 8_030_261_248, 7_615_616_512, 7_241_732_096, 134_515_008]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_says_what_it_takes(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    hub_cache(tmp_path, HUB, monkeypatch)
    asked = read_run_recipe(recipe)
    text = recipe.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n") and "xpect" in text
    places = []
    if asked.base == ".family/base":  # built where it is tested; here its configuration is enough
        for name in ("base", *asked.experts):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(json.dumps(SMOLLM2))
            places += ["--model", f"{name}={tmp_path / name}"]
    found = dry_run(recipe, "--out", tmp_path / "out", *places)
    hub = {name: HUB.get(model["source"]) for name, model in found["models"].items()}
    assert set(hub) == {"base", *asked.experts}
    for name, model in found["models"].items():
        assert model["download"] == (hub[name] is not None)
        if hub[name] is not None and "peft_type" not in hub[name]:
            assert model["bytes"] == 2 * parameters(hub[name])
    assert [stage["stage"] for stage in found["stages"]] == ["score", "fuse", "eval", "report"]
    assert {stage["state"] for stage in found["stages"]} == {"to do"}
    assert all(stage["memory_bytes"] > 0 for stage in found["stages"])
    assert found["about_seconds"] > 0 and found["written_bytes"] > 0
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    hub_cache(tmp_path, {}, monkeypatch)
    recipe = ROOT / "recipes" / "lora.yaml"
    found = dry_run(recipe, "--out", tmp_path / "out")
    names = ["mistralai/Mistral-7B-v0.1", "predibase/gsm8k", "predibase/magicoder"]
    assert found["download_bytes_unknown"] == names and found["about_seconds"] is None
    shown = CliRunner().invoke(cli.app, ["run", str(recipe), "--dry-run", "--out", str(tmp_path / "out")])
    assert shown.exit_code == 0 and shown.stdout.count("unknown until downloaded") >= 3


def test_a_dry_run_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    hub_cache(tmp_path, HUB, monkeypatch)
    recipe = ROOT / "recipes" / "llama2-13b-wizard.yaml"
    shown = CliRunner().invoke(cli.app, ["run", str(recipe), "--dry-run", "--out", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    for said in (
        "to be downloaded",
        "26 GB estimated from its config",
        "104 GB",
        "Intel Xeon",
        "about",
        "cuda was not",
    ):
        assert said in shown.stdout, said


def test_the_recipe_for_mergekit_is_read_too() -> None:
    assert read_yaml_recipe(ROOT / "recipes" / "demo-uniform.yml").merge_method == "task_arithmetic"
