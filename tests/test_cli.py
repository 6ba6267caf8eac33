"""Every command as a user gives it, on tiny models: what is printed where, what is written, how it ends."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer.main
import yaml
from families import write_home
from safetensors.torch import load_file
from talkers import MURMUR, SHOUT, save_talker
from typer.testing import CliRunner

import wpmerge
from wpmerge import cli, cli_fuse

ASKED = ["it has no words", "the number", "you and it", "my words"]
STRICT = "ifeval/prompt_level_strict_acc"
QUICK = ["--prompts=12", "--held-out=6", "--reference-tokens=6", "--top-k=3", "--random-sample=4", "--verify-prompts=2"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Any:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fail(*arguments: object) -> str:
    """The message of a command that must end with code 2, print nothing on stdout and show no traceback."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.stderr
    return str(result.stderr)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family, prompts, and what ``score`` makes of them, with what it printed."""
    path = write_home(tmp_path_factory.mktemp("home"))
    result = succeed(*score_command(path, path / "scores"), "--accept-anchor", "--json")
    (path / "printed.json").write_text(result.stdout)
    (path / "said.txt").write_text(result.stderr)
    return path


def score_command(path: Path, out: Path) -> list[str]:
    experts = [part for name in "ab" for part in ("--expert", f"{name}={path / name}")]
    capabilities = [part for name in "ab" for part in ("--capability", f"{name}={path / name}.jsonl")]
    return ["score", "--base", str(path / "base"), *experts, *capabilities, "--out", str(out), *QUICK]


# --- the shell


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, wpmerge.cli\n"
        "try: wpmerge.cli.main()\n"
        "except SystemExit as end: code = end.code\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr); sys.exit(code)"
    )
    for command in (
        [],
        ["score"],
        ["fuse"],
        ["merge"],
        ["verify"],
        ["eval"],
        ["run"],
        ["report"],
        ["inspect"],
        ["demo"],
        ["questions"],
    ):
        arguments = [sys.executable, "-c", code, *command, "--help"]
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
        heavy = {"torch", "transformers", "safetensors", "numpy", "huggingface_hub", "lm_eval", "rich", "altair"}
        assert not heavy & set(json.loads(result.stderr.replace("'", '"'))), command
        assert f"Usage: wpmerge {' '.join(command)}".strip() in result.stdout


def test_the_version_and_the_module_form() -> None:
    arguments = [sys.executable, "-m", "wpmerge", "--version"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == f"wpmerge {wpmerge.__version__}\n"


def test_every_option_says_what_it_is_and_its_default() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert set(commands) == {
        "score",
        "fuse",
        "merge",
        "verify",
        "eval",
        "bench",
        "prove",
        "run",
        "report",
        "inspect",
        "demo",
        "questions",
    }
    for name, command in commands.items():
        sections = re.split(r"\n  (?=--)", succeed(name, "--help").stdout.partition("Options:")[2])
        shown = {section.split()[0]: " ".join(section.split()) for section in sections if section.strip()}
        options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
        assert set(shown) == {each.opts[0] for each in options} | {"--help"}
        for option in options:
            text = shown[option.opts[0]]
            assert option.help and re.search(r"\[required\]|Default: \S|\[default: \S", text), (
                f"{name} {option.opts[0]}"
            )


def test_defaults_are_those_of_the_functions() -> None:
    from wpmerge.arch import KINDS
    from wpmerge.coefficients import RULES
    from wpmerge.fusing import FuseSettings
    from wpmerge.harness import HarnessSettings
    from wpmerge.merging import SHARD_BYTES
    from wpmerge.options import byte_size
    from wpmerge.plan import Granularity
    from wpmerge.readings import ScoreSettings

    assert (KINDS, RULES, get_args(Granularity)) == (cli.KINDS, cli_fuse.RULES, cli_fuse.GRANULARITIES)
    defaults = {
        name: {parameter.name: parameter.default for parameter in command.params}
        for name, command in typer.main.get_command(cli.app).commands.items()  # type: ignore[attr-defined]
    }
    renamed = {
        "readouts": "readout",
        "top": "top_k",
        "sample": "random_sample",
        "kinds": "kind",
        "estimators": "estimator",
        "directions": "direction",
        "scales": "scale",
        "model_args": "model_arg",
        "unsafe_code": "confirm_unsafe_code",
    }
    given_otherwise = {"kinds", "scales", "model_args", "seed", "max_memory"}  # None stands for all or none of them
    for command, settings in (("score", ScoreSettings()), ("fuse", FuseSettings()), ("eval", HarnessSettings())):
        for field in fields(settings):
            found = defaults[command][renamed.get(field.name, field.name)]
            if field.name not in given_otherwise - {"seed"}:
                expected = getattr(settings, field.name)
                assert str(found) == str(list(expected) if isinstance(expected, tuple) else expected), field.name
            else:
                assert found is None, field.name
    assert {byte_size("", defaults[command]["shard_size"]) for command in ("fuse", "merge")} == {SHARD_BYTES}


# --- from scores to a merge


def test_score_prints_json_alone_and_says_what_it_does_on_stderr(home: Path) -> None:
    found = json.loads((home / "printed.json").read_text())
    assert list(found["readouts"]) == ["a", "a@anchor", "b", "b@anchor"]
    assert found["units"] == {"head": 4, "neuron": 32, "kv_group": 2, "norm": 2, "embedding": 1, "final_norm": 1}
    head = found["readouts"]["a"]["kinds"]["head"]
    assert (head["units"], head["scored"], head["verified"]) == (12, 12, 7)
    assert found["provenance"]["settings"]["held_out"] == 6
    said = (home / "said.txt").read_text()
    assert "a: linear\n" in said and "Loading" not in said and "%|" not in said


def test_every_setting_of_score_arrives(home: Path, tmp_path: Path) -> None:
    options = (
        "--readout anchor --kind head --kind norm --no-cross --estimator integrated "
        "--integrated-points 1 --direction necessity --layer 1 --accept-anchor --seed 5 --tokens-per-row 64 --stream "
        "--vocab base "
        f"--top-k 0 --random-sample 0 --retain plain={home / 'a.jsonl'} --max-memory 20GB"
    )
    result = succeed(*score_command(home, tmp_path / "s"), *options.split())
    settings = json.loads((tmp_path / "s" / "scores.json").read_text())["provenance"]["settings"]
    assert settings == {
        "readouts": ["anchor"],
        "prompts": 12,
        "held_out": 6,
        "reference_tokens": 6,
        "top": 0,
        "sample": 0,
        "verify_prompts": 2,
        "kinds": ["head", "norm"],
        "cross": False,
        "estimators": ["linear", "integrated"],
        "directions": ["sufficiency", "necessity"],
        "integrated_points": 1,
        "max_memory": 20_000_000_000,
        "layer": 1,
        "accept_anchor": True,
        "tokens_per_row": 64,
        "vocab": "base",
        "seed": 5,
    }
    assert "a: anchor (pair), l* 1, gap" in result.stdout and "residual-stream units" in result.stdout
    rows = [line.split()[:4] for line in result.stdout.splitlines()]
    assert ["head", "8", "of", "12"] in rows  # two of three layers lie below the anchor
    assert "a: necessity" in result.stdout


def test_fuse_chooses_scales_and_writes_a_model(home: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = succeed("fuse", home / "scores", "--out", tmp_path / "m", "--evaluations", 5, "--steps", 2, "--json")
    found = json.loads(result.stdout)
    assert (found["rule"], found["granularity"], set(found["scales"])) == ("refine", "unit", {"a", "b"})
    assert set(found["held_out_retention"]) == {"a", "b"}
    assert found["written"]["tensors"] == found["experts"]["a"]["tensors"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype.itemsize == 2
    table = succeed("inspect", tmp_path / "m").stdout
    assert f"{tmp_path / 'm'}: plan, checkpoint" in table and "model.layers.*.mlp.up_proj.weight" in table


def test_fuse_plans_its_memory(home: Path, tmp_path: Path) -> None:
    command = ["fuse", home / "scores", "--out", tmp_path / "p", "--steps", 1, "--evaluations", 4, "--plan-only"]
    assert "fusing does not fit into --max-memory" in fail(*command, "--max-memory", "1MB")
    succeed(*command, "--max-memory", "20GB")
    settings = json.loads((tmp_path / "p" / "plan.json").read_text())["provenance"]["settings"]
    assert settings["max_memory"] == 20_000_000_000


def test_fuse_takes_scales_rule_and_size_of_files(home: Path, tmp_path: Path) -> None:
    options = "--rule select --scale 0.5 --scale b=0.75 --density 0.5 --floor 0.5 --shard-size 4KB --dtype float32"
    result = succeed("fuse", home / "scores", "--out", tmp_path / "m", *options.split(), "--threads", 2)
    plan = json.loads(succeed("inspect", tmp_path / "m", "--json").stdout)
    experts = plan["plan"]["experts"]
    assert [(experts[name]["least"], experts[name]["greatest"]) for name in "ab"] == [(0.25, 0.5), (0.375, 0.75)]
    assert plan["checkpoint"]["parameters_by_dtype"] == {"float32": plan["checkpoint"]["parameters"]}
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    assert ["a", "0.5", "0.25", "to", "0.5", "–"] in [line.split() for line in result.stdout.splitlines()]


def test_a_plan_alone_and_inputs_that_moved(home: Path, tmp_path: Path) -> None:
    places = [f"--model={name}={home / name}" for name in ("base", "a", "b")]
    command = ["fuse", home / "scores", "--out", tmp_path / "p", "--scale", "0.5", "--plan-only", *places]
    assert json.loads(succeed(*command, "--json").stdout)["written"] is None
    assert sorted(file.name for file in (tmp_path / "p").iterdir()) == ["plan.json", "plan.safetensors", "recipe.yml"]
    assert "the output directory exists" in fail(*command)
    succeed(*command, "--overwrite")


def test_merge_carries_out_the_recipe_that_fuse_wrote(home: Path, tmp_path: Path) -> None:
    succeed("fuse", home / "scores", "--out", tmp_path / "m", "--rule", "scaled", "--scale", "0.5")
    result = succeed("merge", tmp_path / "m" / "recipe.yml", "--out", tmp_path / "again", "--json")
    assert json.loads(result.stdout)["out"] == str(tmp_path / "again")
    one, other = (json.loads(succeed("inspect", tmp_path / each, "--json").stdout) for each in ("m", "again"))
    assert one["checkpoint"]["content_hash"] == other["checkpoint"]["content_hash"]


def tensors(path: Path) -> dict[str, Any]:
    return dict(load_file(path / "model.safetensors"))


def test_a_plan_is_merged_as_fuse_merges_it_and_verified(home: Path, tmp_path: Path) -> None:
    common = ["fuse", home / "scores", "--rule", "proportional", "--scale", "0.5"]
    succeed(*common, "--out", tmp_path / "m", "--exact-recipe", tmp_path / "exact")
    succeed(*common, "--out", tmp_path / "plan", "--plan-only")
    places = [f"--model={name}={home / name}" for name in ("base", "a", "b")]
    succeed("merge", tmp_path / "plan", "--out", tmp_path / "again", *places)
    made, again = tensors(tmp_path / "m"), tensors(tmp_path / "again")
    assert all(torch.equal(made[name], again[name]) for name in made)
    succeed("merge", tmp_path / "exact" / "recipe.yml", "--out", tmp_path / "by-recipe", "--dtype", "float32")
    succeed("merge", tmp_path / "plan", "--out", tmp_path / "by-plan", "--dtype", "float32")
    by_recipe, by_plan = tensors(tmp_path / "by-recipe"), tensors(tmp_path / "by-plan")
    assert all(torch.allclose(by_recipe[name], by_plan[name], atol=2e-7) for name in by_plan)

    found = json.loads(succeed("verify", tmp_path / "m", "--all", "--json").stdout)
    assert found["passed"] and found["recomputed"] == found["tensors"] == len(made)
    assert "0" in succeed("verify", tmp_path / "m", "--sample", 2).stdout
    file = tmp_path / "m" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)
    result = run("verify", tmp_path / "m", "--all", "--json")
    assert result.exit_code == 1 and len(json.loads(result.stdout)["faults"]) == 1


def test_fuse_combines_by_ties(home: Path, tmp_path: Path) -> None:
    common = ["fuse", home / "scores", "--rule", "scaled", "--scale", "0.5"]
    succeed(*common, "--out", tmp_path / "ties", "--method", "ties", "--method-density", "0.5")
    succeed(*common, "--out", tmp_path / "sum")
    recipe = yaml.safe_load((tmp_path / "ties" / "recipe.yml").read_text())
    assert recipe["merge_method"] == "ties"
    ties, summed = tensors(tmp_path / "ties"), tensors(tmp_path / "sum")
    assert any(not torch.equal(ties[name], summed[name]) for name in ties)
    assert "is for task_arithmetic" in fail(
        *common, "--out", tmp_path / "no", "--method", "ties", "--exact-recipe", tmp_path / "exact"
    )
    for inside in (tmp_path / "sum", tmp_path / "sum" / "exact"):
        before = tensors(tmp_path / "sum")
        assert "the output" in fail(*common, "--out", tmp_path / "sum", "--exact-recipe", inside, "--overwrite")
        assert tensors(tmp_path / "sum").keys() == before.keys()
    assert "did you mean ties" in fail(*common, "--out", tmp_path / "no", "--method", "tie")
    assert not (tmp_path / "no").exists()


def test_merge_says_what_does_not_go_together(home: Path, tmp_path: Path) -> None:
    succeed("fuse", home / "scores", "--out", tmp_path / "p", "--rule", "scaled", "--scale", "0.5", "--plan-only")
    out = ["--out", tmp_path / "m"]
    assert "a plan is carried out as it is" in fail("merge", tmp_path / "p", *out, "--engine", "mergekit")
    assert "names its models itself" in fail("merge", tmp_path / "p" / "recipe.yml", *out, "--model", "base=x")
    assert "did you mean mergekit" in fail("merge", tmp_path / "p" / "recipe.yml", *out, "--engine", "mergekitt")
    assert "takes its settings from the recipe" in fail(
        "merge", tmp_path / "p" / "recipe.yml", *out, "--engine", "mergekit", "--allow-nan"
    )
    assert not (tmp_path / "m").exists()


def test_inspect_shows_the_strongest_units(home: Path) -> None:
    out = succeed("inspect", home / "scores", "--top", 2).stdout
    section = out.partition("a: strongest units")[2].partition("a@anchor")[0]
    assert sum(line.split()[0].startswith("head.") for line in section.splitlines() if line.strip()) == 2


# --- evaluation


def write_documents(path: Path) -> Path:
    rows = [
        {"key": key, "prompt": text, "instruction_id_list": ["change_case:english_capital"], "kwargs": [{}]}
        for key, text in enumerate(ASKED)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_whole_plan(path: Path, base: Path, expert: Path) -> Path:
    """All of the expert: coefficient 1."""
    import torch

    from wpmerge.checkpoint import open_checkpoint
    from wpmerge.plan import Coefficient, Plan, input_model

    opened = open_checkpoint(base)
    one = Coefficient(values=torch.tensor(1.0))
    plan = Plan(
        base=input_model(opened),
        experts={"loud": input_model(open_checkpoint(expert))},
        coefficients={"loud": dict.fromkeys(opened.tensors, one)},
        rule="uniform",
        granularity="expert",
    )
    plan.save(path)
    return path


def test_eval_of_models_and_a_plan_in_memory(tmp_path: Path) -> None:
    base, loud = save_talker(tmp_path / "base", MURMUR), save_talker(tmp_path / "talker", SHOUT)
    plan = write_whole_plan(tmp_path / "plan", base, loud)
    data = write_documents(tmp_path / "ifeval.jsonl")
    command = ["eval", base, f"loud={loud}", "--plan", f"merged={plan}", "--task-data", f"ifeval={data}"]
    command += ["--base", "base", "--skill", f"loud={STRICT}", "--max-gen-tokens", 24, "--batch-size", 2]
    command += ["--limit", 3, "--seed", 7, "--dtype", "float32", "--device", "cpu"]
    command = [sys.executable, "-m", "wpmerge", *command, "--out", tmp_path / "e", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert {name: row[STRICT]["value"] for name, row in found["models"].items()} == {"base": 0, "loud": 1, "merged": 1}
    assert found["models"]["base"][STRICT]["n"] == 3
    assert found["differences"]["merged"][STRICT] == {"value": 1, "low": 1, "high": 1}
    assert found["retention"]["merged"]["mean"]["value"] == 1
    settings = json.loads((tmp_path / "e" / "evaluation.json").read_text())["settings"]
    assert (settings["seed"], settings["batch_size"], settings["dtype"]) == (7, 2, "float32")
    assert "%|" not in result.stderr and "Warning" not in result.stderr
    assert result.stderr.count("evaluating merged\n") == 1

    table = succeed("inspect", tmp_path / "e").stdout
    assert ["retention,", "fraction"] in [line.split()[:2] for line in table.splitlines()]
    assert "1.000 ± 0" in table and "change_case" not in table


def test_what_eval_refuses(tmp_path: Path) -> None:
    base = save_talker(tmp_path / "base", MURMUR)
    data = ["--task-data", f"ifeval={write_documents(tmp_path / 'd.jsonl')}", "--out", tmp_path / "e"]
    assert "model to evaluate" in fail("eval", *data)
    assert "names base twice" in fail("eval", base, f"base={base}", *data)
    assert "--skill names no evaluated model" in fail("eval", base, "--skill", "x=y", *data)
    assert "--base NAME" in fail("eval", base, "--skill", "base=y", *data)
    assert "--batch-size" in fail("eval", base, "--batch-size", "many", *data)
    assert "no plan has such an input" in fail("eval", base, "--model", "a=b", *data)
    assert "--max-gen-tokens" in fail("eval", base, *data)  # the window is shorter than IFEval's responses
    assert not (tmp_path / "e").exists()


def test_what_eval_refuses_of_checkers_before_any_model(tmp_path: Path) -> None:
    data = ["--task-data", f"ifeval={write_documents(tmp_path / 'd.jsonl')}", "--out", tmp_path / "e"]
    file = tmp_path / "checkers.py"
    command = ["eval", tmp_path / "no_model", *data, "--checkers", file]
    assert "is no file" in fail(*command)
    file.write_text("import no_such_module")
    assert "ModuleNotFoundError: No module named 'no_such_module'" in fail(*command)
    file.write_text("INSTRUCTION_DICT = 1")
    assert "defines no checkers" in fail(*command)


# --- errors


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (["--expert", "a"], "--expert is malformed"),
        (["--expert", "=x"], "--expert is malformed"),
        (["--expert", "a=x"], "--expert names a twice"),
        (["--expert", "base=x"], "no expert may bear"),
        (["--capability", "a="], "--capability is malformed"),
        (["--capability", "c=a.jsonl"], "capability"),
        (["--readout", "divergance"], "--readout has no such value"),
        (["--kind", "heads"], "did you mean head?"),
        (["--prompts", "3"], "--prompts"),
        (["--device", "tpu9"], "--device cannot be used"),
        (["--layer", "99"], "layer"),
        (["--base", "/no/where"], "/no/where"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_score_refuses_in_one_form(home: Path, tmp_path: Path, change: list[str], complaint: str) -> None:
    assert complaint in fail(*score_command(home, tmp_path / "s"), "--accept-anchor", *change)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (["--rule", "scald"], "did you mean scaled?"),
        (["--granularity", "units"], "did you mean unit?"),
        (["--scale", "x"], "--scale is malformed"),
        (["--scale", "c=1"], "unknown expert"),
        (["--scale", "9"], "out of range"),
        (["--rule", "select", "--density", "2"], "density is out of range"),
        (["--model", "c=x"], "no such model"),
        (["--shard-size", "big"], "--shard-size is no size"),
        (["--dtype", "int8"], "--dtype has no such value"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_fuse_refuses_in_one_form(home: Path, tmp_path: Path, change: list[str], complaint: str) -> None:
    assert complaint in fail("fuse", home / "scores", "--out", tmp_path / "m", *change)
    assert list(tmp_path.iterdir()) == []


def test_an_output_over_an_input_is_refused(home: Path) -> None:
    before = sorted(home.rglob("*"))
    assert "not an output of wpmerge" in fail(*score_command(home, home / "a"), "--overwrite", "--accept-anchor")
    assert "the output contains an input" in fail("fuse", home / "scores", "--out", home, "--overwrite", "--scale", "1")
    assert sorted(home.rglob("*")) == before


def test_a_message_says_what_where_and_how_to_mend(tmp_path: Path) -> None:
    message = fail("inspect", tmp_path)
    assert message.startswith("error: nothing here that wpmerge knows\n  where: ")
    assert "cannot be read" in fail("fuse", tmp_path, "--out", tmp_path / "m")
    assert "the output directory exists" in fail("demo", "--out", tmp_path)
    assert "nowhere.yml" in fail("merge", tmp_path / "nowhere.yml", "--out", tmp_path / "m")


INTERRUPTED = """
import os, signal, sys
from wpmerge.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it

class Interrupting:  # the signal comes at a known moment, however busy the machine is
    def __init__(self, inner): self.inner = inner
    def __getattr__(self, name): return getattr(self.inner, name)
    def write(self, text):
        written = self.inner.write(text)
        if "a: exact" in text:
            os.kill(os.getpid(), signal.SIGINT)
        return written

sys.stderr = Interrupting(sys.stderr)
main()
"""


def test_an_interrupt_ends_with_one_sentence_and_can_be_continued(home: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, *score_command(home, tmp_path / "s"), "--accept-anchor"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    end = "interrupted: run the same command again, and it goes on from the pieces that are finished\n"
    assert "a: exact" in done.stderr and done.stderr.endswith(end)
    assert not (tmp_path / "s").exists()
    result = succeed(*score_command(home, tmp_path / "s"), "--accept-anchor")
    assert "a: linear\n" not in result.stderr and "b: linear\n" in result.stderr
