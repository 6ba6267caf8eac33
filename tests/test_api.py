"""The commands as functions: the same names and defaults, the artifacts they hand over, and nothing heavy on import."""

import inspect
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import QUICK, WORDS, word_tokenizer, write_home
from transformers import AutoModelForCausalLM

import wpmerge as wp
from wpmerge import cli, cli_eval, cli_fuse, cli_merge
from wpmerge.options import LEAST
from wpmerge.run_recipe import Judging, MergeRule, Output, RunRecipe, Scoring
from wpmerge.verify import verify

COMMANDS = {"score": cli.score, "fuse": cli_fuse.fuse, "merge": cli_merge.merge, "evaluate": cli_eval.evaluate}
SHELL_ONLY = {"as_json", "verbose"}


def defaults(function: Any) -> dict[str, str]:
    """Parameter → default as text, lists as tuples; a parameter without one is absent."""
    return {
        name: str(tuple(each.default) if isinstance(each.default, list) else each.default)
        for name, each in inspect.signature(function).parameters.items()
        if each.default is not inspect.Parameter.empty
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_names_and_defaults_are_the_commands(name: str) -> None:
    command, function = COMMANDS[name], getattr(wp, name)
    assert set(inspect.signature(function).parameters) == (
        set(inspect.signature(command).parameters) - SHELL_ONLY | {"progress"}
    )
    ours = defaults(function)
    assert ours.pop("progress") == "None"
    assert ours == {key: value for key, value in defaults(command).items() if key not in SHELL_ONLY}


def test_a_recipes_keys_and_defaults_are_the_functions() -> None:
    names = {"name": "rule"}
    for section, function in ((Scoring, wp.score), (MergeRule, wp.fuse), (Output, wp.fuse), (Judging, wp.evaluate)):
        theirs = defaults(function)
        for key, field in section.model_fields.items():
            if key == "directory":
                continue
            given = tuple(field.default) if isinstance(field.default, list) else field.default
            expected = theirs[names.get(key, key)]
            assert str(given) == expected or (given == {} and expected == "None"), key
    assert defaults(wp.score)["device"] == RunRecipe.model_fields["device"].default


def test_every_parameter_is_documented() -> None:
    for name in COMMANDS:
        function = getattr(wp, name)
        for parameter in inspect.signature(function).parameters:
            assert f"\n        {parameter}: " in inspect.getdoc(function).replace("\n    ", "\n        "), parameter


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, wpmerge; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "transformers", "numpy", "pandas", "pydantic", "typer"} & set(eval(result.stdout))
    assert dir(wp) == sorted(wp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'scores_of'"):
        _ = wp.scores_of


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("home"))


def test_the_whole_way(home: Path) -> None:
    told: list[str] = []
    scores = wp.score(
        base=home / "base",
        expert={name: home / name for name in "ab"},
        capability={name: home / f"{name}.jsonl" for name in "ab"},
        out=home / "scores",
        progress=lambda stage, done, total: told.append(stage),
        **QUICK,
    )
    assert told and isinstance(scores, wp.Scores)
    fused = wp.fuse(home / "scores", out=home / "merged", rule="proportional", scale=0.5)
    assert isinstance(fused, wp.FuseResult) and fused.summary is not None
    again = wp.merge(home / "merged", out=home / "again")
    assert isinstance(again, wp.MergeSummary)
    assert (home / "again" / "model.safetensors").read_bytes() == (home / "merged" / "model.safetensors").read_bytes()
    by_recipe = wp.merge(home / "merged" / "recipe.yml", out=home / "by-recipe")
    assert by_recipe.tensors == again.tensors
    (home / "local.jsonl").write_text('{"prompt": "w3 w4", "answer": "w5"}\n' * 4)
    evaluation = wp.evaluate(
        {"base": home / "base", "a": home / "a"},
        plan={"plan": home / "merged"},
        out=home / "evaluation",
        tasks=["local"],
        task_data={"local": home / "local.jsonl"},
        base="base",
        max_gen_tokens=4,
    )
    assert list(evaluation.models) == ["base", "a", "plan"]
    _check_scores(scores, home)
    _check_plan(fused.plan, home)
    _check_evaluation(evaluation, home)


def _check_scores(scores: wp.Scores, home: Path) -> None:
    table = scores.to_dataframe()
    assert list(table) == ["estimator", "label", "expert", "kind", "layer", "index", "unit", "score"]
    assert len(table) == sum(array.numel() for array in scores.arrays.values())
    row = table[(table.label == "a") & (table.expert == "b") & (table.unit == "neuron.1.3")]
    assert row.score.item() == pytest.approx(float(scores.array("a", "b", "neuron")[1, 3]))
    scores.save(home / "copy")
    assert (home / "copy" / "scores.safetensors").read_bytes() == (home / "scores" / "scores.safetensors").read_bytes()
    assert wp.Scores.load(home / "copy").readouts == scores.readouts


def _check_plan(plan: wp.Plan, home: Path) -> None:
    table = plan.to_dataframe().set_index(["expert", "tensor"])
    name = "model.layers.0.self_attn.q_proj.weight"
    values = plan.coefficients["a"][name].values
    assert len(table) == sum(map(len, plan.coefficients.values()))
    assert table.loc[("a", name), "count"] == values.numel() and table.loc[("a", name), "axis"] == 0
    assert math.isclose(table.loc[("a", name), "mean"], float(values.mean()), rel_tol=1e-6)
    plan.save(home / "plan-copy")
    assert wp.Plan.load(home / "plan-copy").to_dataframe().equals(plan.to_dataframe())


def _check_evaluation(evaluation: wp.Evaluation, home: Path) -> None:
    table = evaluation.to_dataframe()
    assert set(table.model) == {"base", "a", "plan"} and set(table.task) == {"local"} and set(table.n) == {4}
    evaluation.save(home / "evaluation-copy")
    assert wp.Evaluation.load(home / "evaluation-copy").models == wp.Evaluation.load(home / "evaluation").models


def test_what_a_user_can_mend_is_said_before_any_work(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    models = {"base": home / "base", "expert": {"a": home / "a"}, "capability": {"a": home / "a.jsonl"}}
    for call, said in (
        (lambda: wp.score(**models, out=out, readout=["anker"]), "readout has no such value"),
        (lambda: wp.score(**models, out=out, max_memory="much"), "max_memory is no size"),
        (lambda: wp.fuse(out, out=out, rule="best"), "rule has no such value"),
        (lambda: wp.merge(tmp_path, out=out, engine="mergekit"), "a plan is carried out as it is"),
        (lambda: wp.merge(home / "a.jsonl", out=out, model={"a": "x"}), "a recipe names its models itself"),
        (lambda: wp.evaluate({"a": home / "a"}, out=out, skill={"b": "x/y"}), "skill names no evaluated model"),
        (lambda: wp.evaluate({"a": home / "a"}, out=out, skill={"a": "x/y"}), "no model is the base"),
        (lambda: wp.evaluate({"a": home / "a"}, out=out, seed=-1), "seed is out of range"),
        (lambda: wp.evaluate({"a": home / "a"}, out=out, model_arg={"pretrained": "x"}), "set elsewhere"),
    ):
        with pytest.raises(wp.WpmergeError, match=said):
            call()
    assert not out.exists()


def test_an_evaluation_never_replaces_what_it_reads(home: Path, tmp_path: Path) -> None:
    wp.score(
        base=home / "base",
        expert={name: home / name for name in "ab"},
        capability={name: home / f"{name}.jsonl" for name in "ab"},
        out=tmp_path / "scores",
        **QUICK,
    )
    wp.fuse(tmp_path / "scores", out=tmp_path / "plan", rule="uniform", scale=0.5, plan_only=True)
    (tmp_path / "plan" / "local.jsonl").write_text('{"prompt": "w3 w4", "answer": "w5"}\n' * 4)
    before = sorted((tmp_path / "plan").iterdir())
    inside = {"tasks": ["local"], "task_data": {"local": tmp_path / "plan" / "local.jsonl"}}
    beside = {"tasks": ["local"], "task_data": {"local": tmp_path / "local.jsonl"}}
    shutil.copy(tmp_path / "plan" / "local.jsonl", tmp_path)
    for given in (
        {"plan": {"p": tmp_path / "plan"}, **beside},
        {"model": {"base": home / "base"}, **inside},
    ):
        with pytest.raises(wp.WpmergeError, match=r"the output (is|contains) an input"):
            wp.evaluate(**given, out=tmp_path / "plan", overwrite=True)
    with pytest.raises(wp.WpmergeError, match="the output is an input"):  # of the plan
        wp.evaluate(plan={"p": tmp_path / "plan"}, out=home / "a", overwrite=True, **inside)
    assert sorted((tmp_path / "plan").iterdir()) == before and (home / "a" / "model.safetensors").is_file()


def test_an_expert_with_one_pad_token_more(home: Path, tmp_path: Path) -> None:
    """As experts on Llama 2 have it: refused, or cut to the base's rows while it is scored, merged and verified."""
    shutil.copytree(home / "base", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(home / "a")
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[PAD]"]})
    model.resize_token_embeddings(WORDS + 1, mean_resizing=False)
    model.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    asked: dict[str, Any] = {
        "base": tmp_path / "base",
        "expert": {"a": tmp_path / "a", "b": home / "b"},
        "capability": {name: home / f"{name}.jsonl" for name in "ab"},
    }
    with pytest.raises(wp.WpmergeError, match="not of the base's family"):
        wp.score(**asked, out=tmp_path / "scores", **QUICK)
    cut = wp.score(**asked, out=tmp_path / "scores", vocab="base", **QUICK)
    wp.score(**{**asked, "expert": {name: home / name for name in "ab"}}, out=tmp_path / "plain", **QUICK)
    plain = wp.Scores.load(tmp_path / "plain")
    assert all(torch.equal(cut.arrays[key], array) for key, array in plain.arrays.items())
    wp.fuse(tmp_path / "scores", out=tmp_path / "merged", rule="uniform", scale=0.5)
    wp.fuse(tmp_path / "plain", out=tmp_path / "plain-merged", rule="uniform", scale=0.5)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "plain-merged")]
    assert weights[0] == weights[1]
    assert verify(tmp_path / "merged", sample=None).passed


@pytest.mark.parametrize("name", list(LEAST))
def test_counts_out_of_range_are_refused_as_the_commands_refuse_them(name: str, tmp_path: Path) -> None:
    """Before anything is read: none of these inputs exists."""
    calls: dict[str, Any] = {
        "score": lambda **more: wp.score(
            base="b", expert={"a": "a"}, capability={"a": "a.jsonl"}, out=tmp_path / "o", **more
        ),
        "fuse": lambda **more: wp.fuse("scores", out=tmp_path / "o", **more),
        "merge": lambda **more: wp.merge("recipe.yml", out=tmp_path / "o", **more),
        "evaluate": lambda **more: wp.evaluate({"m": "m"}, out=tmp_path / "o", **more),
    }
    taken = [each for each in calls if name in inspect.signature(getattr(wp, each)).parameters]
    assert taken
    for each in taken:
        for bad in (LEAST[name] - 1, 1.5):
            with pytest.raises(wp.WpmergeError, match=rf"{name} is out of range(.|\n)*{LEAST[name]}"):
                calls[each](**{name: bad})
        (option,) = inspect.signature(COMMANDS[each]).parameters[name].annotation.__metadata__
        assert option.min == LEAST[name]


def test_a_memory_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(wp.WpmergeError, match="max_memory is no size"):
        wp.score(base="b", expert={"a": "a"}, capability={"a": "a.jsonl"}, out=tmp_path / "o", max_memory=0)
    with pytest.raises(wp.WpmergeError, match="max_memory is no size"):
        wp.fuse("scores", out=tmp_path / "o", max_memory=0)
