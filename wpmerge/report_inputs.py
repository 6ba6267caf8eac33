"""What a report is made from: the artifacts, read, and refused where they do not belong together."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wpmerge.arch import Layout
from wpmerge.checkpoint import open_checkpoint
from wpmerge.directory import locate
from wpmerge.errors import CheckpointError, WpmergeError
from wpmerge.evaluation import Evaluation, load_evaluation
from wpmerge.models import layout_of
from wpmerge.plan import BASE, InputModel, Plan, load_plan
from wpmerge.proof import CONDITIONS, absent, load_proof
from wpmerge.scores import Scores, load_scores
from wpmerge.statistics import Retention

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """The artifacts of a report; all but the scores may be missing.

    Attributes:
        scores: what every report shows.
        plan: of a merge.
        evaluation: of models, the base or an expert of the scores among them.
        proof: ``proof.json``.
        bench: ``bench.json``.
        layout: of the base; None where no plan asks for it, or the base is not where it was.
        paths: "scores", "plan", "evaluation", "proof", "bench" → where it was read.
        retention: of the evaluation's models; its intervals take seconds, so they are computed once.
        remarks: what a reader should know about how these fit together, a sentence each.
    """

    scores: Scores
    plan: Plan | None = None
    evaluation: Evaluation | None = None
    proof: Mapping[str, Any] | None = None
    bench: Mapping[str, Any] | None = None
    layout: Layout | None = None
    retention: Mapping[str, Retention] = field(default_factory=dict)
    paths: Mapping[str, Path] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def read_material(
    scores: Path,
    *,
    plan: Path | None = None,
    evaluation: Path | None = None,
    proof: Path | None = None,
    bench: Path | None = None,
) -> Material:
    """Read artifacts from their directories.

    Raises:
        WpmergeError: one cannot be read, or is about other models or skills than the scores.
    """
    given = {"scores": scores, "plan": plan, "evaluation": evaluation, "proof": proof, "bench": bench}
    found = load_scores(scores)
    remarks: list[str] = []
    layout, made = None, None if plan is None else load_plan(plan)
    if made is not None and plan is not None:
        _check_models(found, {BASE: made.base, **made.experts}, "the plan", plan)
        layout = _layout(found, remarks)
    judged = None if evaluation is None else load_evaluation(evaluation)
    if judged is not None and evaluation is not None:
        remarks += _check_evaluation(found, judged, evaluation)
    proved = None if proof is None else load_proof(proof)
    if proved is not None and (strange := sorted(set(proved["capabilities"]) - set(found.experts))):
        raise _foreign("the proof", proof, f"capability {strange[0]}", ", ".join(found.experts))
    missing = [
        key for each in (proved or {"capabilities": {}})["capabilities"].values() for key in absent(each["stability"])
    ]
    if missing:
        words = ", ".join(CONDITIONS[key] for key in dict.fromkeys(missing))
        remarks.append(f"The proof was written by an early version, which kept no rank stability over {words}.")
    return Material(
        scores=found,
        plan=made,
        evaluation=judged,
        proof=proved,
        bench=None if bench is None else _bench(found, bench),
        layout=layout,
        retention={} if judged is None else judged.retention(),
        paths={name: path for name, path in given.items() if path is not None},
        remarks=tuple(remarks),
    )


def _foreign(what: str, where: object, got: str, expected: str) -> WpmergeError:
    return WpmergeError(
        f"{what} is about other models or skills than the scores",
        where=where,
        got=got,
        expected=expected,
        mend="give the scores it was made from",
    )


def _check_models(scores: Scores, models: Mapping[str, InputModel], what: str, where: Path) -> None:
    known = {BASE: scores.base, **scores.experts}
    for name, model in models.items():
        if name not in known:
            raise _foreign(what, where, f"expert {name}", ", ".join(scores.experts))
        if model.content_hash != known[name].content_hash:
            raise _foreign(what, where, f"{name} with {model.content_hash}", known[name].content_hash)


def _layout(scores: Scores, remarks: list[str]) -> Layout | None:
    """The base's units; a checkpoint that lies elsewhere now is no reason to have no report."""
    try:
        if not Path(scores.base.source).expanduser().is_dir():
            raise CheckpointError("the base is not at hand", where=scores.base.source)
        checkpoint = open_checkpoint(locate(scores.base.source))
        if checkpoint.content_hash() == scores.base.content_hash:
            return layout_of(checkpoint)
        why = "holds other weights now"
    except WpmergeError as error:
        why = f"cannot be opened ({error.what})"
    remarks.append(f"The base at {scores.base.source} {why}, so the sentences behind coefficients are left out.")
    logger.warning("%s", remarks[-1])
    return None


def _check_evaluation(scores: Scores, evaluation: Evaluation, where: Path) -> list[str]:
    """Remarks on models that were evaluated elsewhere than scored.

    Raises:
        WpmergeError: a skill of no scored expert, or none of the evaluation's models among the scores'.
    """
    known = {BASE: scores.base.source, **{name: expert.source for name, expert in scores.experts.items()}}
    for skill, each in evaluation.skills.items():
        if each.expert not in scores.experts:
            raise _foreign("the evaluation", where, f"skill {skill} of {each.expert}", ", ".join(scores.experts))
    shared = {name for name, model in evaluation.models.items() if name in known or model.source in known.values()}
    if not shared:
        raise _foreign("the evaluation", where, ", ".join(evaluation.models), ", ".join(known))
    return [
        f"{name} was evaluated from {evaluation.models[name].source} and scored from {known[name]}."
        for name in evaluation.models
        if name in known and Path(evaluation.models[name].source).name != Path(known[name]).name
    ]


def _bench(scores: Scores, where: Path) -> dict[str, Any]:
    file = where / "bench.json" if where.is_dir() else where
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        models = dict(found["provenance"]["identity"]["models"])
        for cell in found["cells"]:
            _ = [row["mean"]["value"] + row["minimum"]["low"] for row in cell["rows"] if row["mean"]["value"]]
            _ = cell["measure"], list(cell["subset"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WpmergeError(
            "a benchmark cannot be read",
            where=file,
            got=f"{type(error).__name__}: {error}",
            expected="bench.json, as `wpmerge bench` writes it",
        ) from None
    known = {BASE: scores.base.content_hash, **{name: each.content_hash for name, each in scores.experts.items()}}
    for name, content in models.items():
        if known.get(name) != content:
            raise _foreign("the benchmark", file, f"{name} with {content}", str(known.get(name, ", ".join(known))))
    return found
