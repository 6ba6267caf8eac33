"""The commands of a report are those that made its artifacts."""

import shlex
from pathlib import Path

from reports import made_bench, made_evaluation, made_plan, made_proof, made_scores
from typer.main import get_command

from wpmerge import cli
from wpmerge.readings import ScoreSettings
from wpmerge.repeating import bench_command, eval_command, fuse_command, prove_command, score_command


def parsed(command: str) -> dict:
    """What the command line makes of it: a command's own parser is the judge."""
    _, name, *arguments = shlex.split(command)
    group = get_command(cli.app)
    each = group.commands[name]
    return each.make_context(name, arguments).params


def test_score():
    found = parsed(score_command(made_scores(), Path("my scores")))
    assert (found["base"], found["expert"]) == ("models/base", ["a=models/a", "b=models/b"])
    assert [each.partition("=")[0] for each in found["capability"]] == ["a", "b"]
    assert [each.partition("=")[0] for each in found["retain"]] == ["plain"]
    assert (found["prompts"], found["top_k"], found["out"]) == (8, 3, Path("my scores"))
    assert found["held_out"] == ScoreSettings().held_out


def test_settings_that_are_not_the_defaults():
    scores = made_scores()
    known = {"cross": False, "kinds": ["head", "norm"], "readouts": ["divergence"], "max_memory": 1000, "layer": None}
    scores.provenance["settings"].update(known)
    found = parsed(score_command(scores, Path("s")))
    assert (found["cross"], found["kind"], found["readout"]) == (False, ["head", "norm"], ["divergence"])
    assert (found["max_memory"], found["layer"]) == ("1000", None)


def test_the_others():
    scores = made_scores()
    found = parsed(fuse_command(made_plan(scores), Path("s"), Path("p")))
    assert (found["rule"], found["steps"], found["scores"], found["out"]) == ("refine", 8, Path("s"), Path("p"))
    found = parsed(prove_command(made_proof(scores), Path("s"), Path("q")))
    assert (found["share"], found["roles"], found["capability"]) == ([0.1, 0.5], True, ["a", "b"])
    found = parsed(bench_command(made_bench(scores), Path("s"), Path("d")))
    assert found["seed"] == [0] and found["test"] == ["a=FILE", "b=FILE"]
    found = parsed(eval_command(made_evaluation(scores), Path("e")))
    assert found["model"] == ["base=models/base", "a=models/a", "b=models/b", "merge=models/merge"]
    assert (found["tasks"], found["task_data"], found["base"]) == (["ifeval"], ["ifeval=ifeval.jsonl"], "base")
    assert [each.partition("=")[0] for each in found["skill"]] == ["a", "b"] and found["dtype"] == "float32"
