"""The commands that make artifacts again, from what the artifacts say of themselves."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from wpmerge.evaluation import Evaluation
from wpmerge.plan import Plan
from wpmerge.readings import ScoreSettings
from wpmerge.rules import FuseSettings
from wpmerge.scores import Scores

_SCORE = {
    "top": "top-k",
    "sample": "random-sample",
    "kinds": "kind",
    "estimators": "estimator",
    "directions": "direction",
}
_SCORE |= {"readouts": "readout"}
_EVAL = ("max_gen_tokens", "limit", "device", "dtype", "seed", "batch_size")
_BENCH = {name: name for name in ("evaluations", "tune", "tests", "finalists")} | {"longest": "max-new-tokens"}
_EVAL_DEFAULTS = {"dtype": "auto", "seed": 0, "batch_size": 16}


def score_command(scores: Scores, out: Path) -> str:
    """``wpmerge score`` with the inputs and settings that made the scores."""
    parts = ["--base", scores.base.source]
    for name, expert in scores.experts.items():
        parts += ["--expert", f"{name}={expert.source}"]
    for name, record in scores.capabilities.items():
        parts += ["--retain" if record.retain else "--capability", f"{name}={record.source}"]
    known = scores.provenance.get("settings") or {}
    return _line("score", [*parts, *_changed(ScoreSettings, known, _SCORE), *_device(scores.provenance)], out)


def fuse_command(plan: Plan, scores: Path, out: Path) -> str:
    """``wpmerge fuse`` with the settings that made the plan."""
    known = dict(plan.provenance.get("settings") or {"rule": plan.rule, "granularity": plan.granularity})
    parts = [str(scores)]
    for name, value in (known.pop("scales", None) or {}).items():
        parts += ["--scale", f"{name}={value}" if name else str(value)]
    parts += _changed(FuseSettings, known, {})
    parts += [] if (out / "config.json").is_file() else ["--plan-only"]
    if plan.operator.method != "task_arithmetic":
        parts += ["--method", plan.operator.method, "--method-density", str(plan.operator.density)]
    return _line("fuse", [*parts, *_device(plan.provenance)], out)


def prove_command(proof: Mapping[str, Any], scores: Path, out: Path) -> str:
    """``wpmerge prove`` with the settings that made the proof."""
    known = dict(proof["provenance"].get("settings") or {})
    parts = [str(scores)]
    for name in proof["capabilities"]:
        parts += ["--capability", name]
    for share in known.get("shares") or ():
        parts += ["--share", str(share)]
    for name in ("randoms", "prompts", "seed"):
        parts += ["--" + name, str(known[name])] if known.get(name) is not None else []
    parts += ["--roles"] if known.get("roles") else []
    judged = [name for name, each in proof["capabilities"].items() if "judged" in each["readouts"]]
    parts += [part for name in judged for part in ("--generate", f"{name}=FILE")]
    return _line("prove", [*parts, *_device(proof["provenance"])], out)


def eval_command(evaluation: Evaluation, out: Path) -> str:
    """``wpmerge eval`` with the models, tasks and settings of the evaluation."""
    known = evaluation.settings
    parts = []
    for name, model in evaluation.models.items():
        planned = (Path(model.source) / "plan.json").is_file() and not (Path(model.source) / "config.json").is_file()
        parts += ["--plan"] if planned else []
        parts.append(f"{name}={model.source}")
    for task in known.get("tasks") or ():
        parts += ["--tasks", str(task)]
    for task, files in (evaluation.provenance.get("task_data") or {}).items():
        for split, file in files.items():
            parts += ["--task-data", f"{task}:{split}={file}" if split else f"{task}={file}"]
    parts += ["--base", evaluation.base] if evaluation.base is not None else []
    if evaluation.reference not in (None, evaluation.base):
        parts += ["--reference", str(evaluation.reference)]
    parts += _skills(evaluation)
    for name in _EVAL:
        if known.get(name) not in (None, _EVAL_DEFAULTS.get(name)):
            parts += ["--" + name.replace("_", "-"), str(known[name])]
    if known.get("chat_template") is not None:
        parts.append("--chat-template" if known["chat_template"] else "--no-chat-template")
    return _line("eval", parts, out)


def _skills(evaluation: Evaluation) -> list[str]:
    """What the command line can say: one metric an expert."""
    metrics = {each.expert: each.metric for each in evaluation.skills.values()}
    alone = len(metrics) == len(evaluation.skills)
    return [part for name, metric in metrics.items() for part in ("--skill", f"{name}={metric}")] if alone else []


def bench_command(bench: Mapping[str, Any], scores: Path, out: Path) -> str:
    """``wpmerge bench`` with the settings of the benchmark; test files are known by their hashes only."""
    known, identity = bench["provenance"].get("settings") or {}, bench["provenance"]["identity"]
    parts = [str(scores)]
    for name in identity.get("tests") or ():
        parts += ["--test", f"{name}=FILE"]
    parts += ["--retain", "FILE"] if identity.get("retain") else []
    for seed in known.get("seeds") or ():
        parts += ["--seed", str(seed)]
    for name, option in _BENCH.items():
        parts += ["--" + option, str(known[name])] if known.get(name) is not None else []
    return _line("bench", parts, out)


def _changed(settings: Any, known: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    """Options for the settings that are not the defaults."""
    for each in fields(settings):
        default = each.default if each.default is not MISSING else None
        value = known.get(each.name, default)
        value = tuple(value) if isinstance(value, list) else value
        option = "--" + names.get(each.name, each.name).replace("_", "-")
        if each.default is MISSING or value == default or value is None:
            continue
        if isinstance(value, bool):
            yield option if value else option.replace("--", "--no-", 1)
        elif isinstance(value, tuple):
            yield from (part for item in value for part in (option, str(item)))
        else:
            yield from (option, str(value))


def _device(provenance: Mapping[str, Any]) -> list[str]:
    device = provenance.get("device", "cpu")
    return [] if device == "cpu" else ["--device", str(device)]


def _line(command: str, parts: Sequence[str], out: Path) -> str:
    return shlex.join(["wpmerge", command, *parts, "--out", str(out)])
