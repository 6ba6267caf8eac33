"""From Scores to a merged checkpoint: the work behind ``wpmerge fuse``."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wpmerge.checkpoint import Checkpoint
from wpmerge.dtypes import Dtype
from wpmerge.errors import RecipeError
from wpmerge.exact_recipe import check_exact, write_exact_recipe
from wpmerge.explaining import check_names, explain
from wpmerge.memory import merging_budget, return_freed_memory
from wpmerge.merging import SHARD_BYTES, MergeSummary, merge
from wpmerge.models import Family, bounded, open_family, run_facts
from wpmerge.output import check_output, check_space, output_directory, work_directory, write_file
from wpmerge.pieces import Pieces
from wpmerge.plan import BASE, InputModel, Operator, Plan, input_model
from wpmerge.provenance import provenance, versions
from wpmerge.readings import Progress
from wpmerge.recipe import check_with_mergekit, recipe_text
from wpmerge.rules import FuseSettings, RuleOutcome, coefficients_for
from wpmerge.scores import FILES, Scores, load_scores
from wpmerge.streaming import job_dtype
from wpmerge.tuning import TOKENS_PER_ROW, reference_limit

logger = logging.getLogger(__name__)

__all__ = ["FuseResult", "FuseSettings", "fuse", "open_scored_family"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseResult:
    """What a fusion decided and wrote.

    Attributes:
        plan: every coefficient.
        scales: s_e.
        retention: capability → fraction of the gap kept on the held-out prompts; empty if nothing was run there.
        lost: retain set → nats per token below the base on the prompts that decide: the held-out ones and, under
            ``refine``, the scored ones.
        lost_errors: retain set → the standard error of that.
        explanations: unit, as asked for → the numbers behind its coefficients, a sentence each.
        outcome: what the rule decided, and on what grounds.
        summary: of the merge; None if only the plan was asked for.
        out: the directory.
    """

    plan: Plan
    scales: Mapping[str, float]
    retention: Mapping[str, float]
    lost: Mapping[str, float]
    lost_errors: Mapping[str, float]
    explanations: Mapping[str, tuple[str, ...]]
    outcome: RuleOutcome
    summary: MergeSummary | None
    out: Path


def fuse(
    scores_dir: Path,
    out: Path,
    *,
    settings: FuseSettings | None = None,
    models: Mapping[str, str] | None = None,
    explanations: Sequence[str] = (),
    operator: Operator | None = None,
    plan_only: bool = False,
    exact_recipe: Path | None = None,
    allow_nan: bool = False,
    dtype: Dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    threads: int = 2,
    overwrite: bool = False,
    device: str = "cpu",
    resident: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> FuseResult:
    """Turn Scores into coefficients, a plan, a mergekit recipe and a merged checkpoint.

    Args:
        scores_dir: what ``wpmerge score`` wrote.
        out: the directory to be made.
        settings: see :class:`FuseSettings`.
        models: where inputs live now, by name, "base" for the base; the places in the scores otherwise.
        explanations: units or groups whose coefficients are explained.
        operator: what combines the weighted task vectors; None sums them, which is what coefficients are chosen for.
        plan_only: stop before the weights.
        exact_recipe: a directory to be made with a recipe that reproduces the merge in stock mergekit at any
            granularity, see :func:`~wpmerge.exact_recipe.write_exact_recipe`; None for none.
        allow_nan: let values pass that are not finite.
        dtype: of the output; None keeps the base's.
        shard_bytes: most bytes of weights per file.
        threads: blocks merged at a time.
        overwrite: replace an output that is already there.
        device: where held-out prompts are run.
        resident: keep the inputs' weights in memory while scales are chosen.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.
        progress: told what is being done.

    Raises:
        WpmergeError: scores, models, settings or output cannot be used; nothing is written under ``out`` then.
    """
    started = time.monotonic()
    settings = settings or FuseSettings()
    _ = settings.rule_settings, settings.refine_settings  # numbers out of range are refused before anything is read
    tell: Progress = progress or (lambda *_: None)
    scores = load_scores(scores_dir)
    for name in scores.experts:
        if name not in scores.capabilities or scores.capabilities[name].retain:
            raise RecipeError(
                "the scores have no capability of an expert", where=scores_dir, got=name, mend="score again"
            )
    check_output(out, inputs=[scores_dir], overwrite=overwrite)
    family = open_scored_family(
        scores, dict(models or {}), device=device, resident=resident, trust_remote_code=trust_remote_code
    )
    checkpoints = {BASE: family.base, **family.experts}
    inputs = [scores_dir, *(checkpoint.path for checkpoint in checkpoints.values())]
    check_output(out, inputs=inputs, overwrite=overwrite)
    if not plan_only:  # before minutes are spent on choosing scales
        check_space(out, total=_weight_bytes(family.base, dtype))
    operator = operator or Operator()
    if exact_recipe is not None:
        check_output(exact_recipe, inputs=[*inputs, out], overwrite=overwrite)  # nor may it replace the merge
        check_exact(operator)
    check_names(explanations, family.layout, settings.level)
    if settings.max_memory is not None and settings.reads_models:
        family = _within(settings.max_memory, family, scores, settings)
    if settings.max_memory is not None or not family.resident:
        return_freed_memory()
    with work_directory(out, fingerprint=_fingerprint(family, scores, scores_dir, settings, device=device)) as work:
        outcome = coefficients_for(settings, family, scores, pieces=Pieces(work / "pieces"), progress=tell)
        say_what_is_not_kept(scores, outcome)
        explained = [explain(outcome, family.layout, name) for name in explanations]
        plan = Plan(
            base=input_model(family.base),
            experts={name: input_model(expert) for name, expert in family.experts.items()},
            coefficients=outcome.coefficients,
            rule=settings.rule,
            granularity=settings.level,
            operator=operator,
            provenance=provenance(settings, started, device=device, **outcome.record),
        )
        tell("recipe", 0, 1)
        recipe = recipe_text(plan, checkpoints)
        check_with_mergekit(recipe, plan, family.base)
        summary = None
        if plan_only:
            with output_directory(out, inputs=inputs, overwrite=overwrite) as staging:
                plan.save(staging)
                write_file(staging / "recipe.yml", recipe)
        else:
            summary = merge(
                plan,
                checkpoints,
                out,
                shard_bytes=shard_bytes,
                dtype=dtype,
                threads=threads,
                overwrite=overwrite,
                allow_nan=allow_nan,
                vocab=scored_vocabulary(scores),
                progress=lambda done, total: tell("writing", done, total),
            )
    if exact_recipe is not None:
        write_exact_recipe(plan, checkpoints, exact_recipe, overwrite=overwrite)
    standing = outcome.standing
    return FuseResult(
        plan=plan,
        scales=outcome.scales,
        retention={} if standing is None else standing.kept,
        lost={} if standing is None else standing.lost,
        lost_errors={} if standing is None else standing.errors,
        explanations=dict(zip(explanations, explained, strict=True)),
        outcome=outcome,
        summary=summary,
        out=out,
    )


def _fingerprint(family: Family, scores: Scores, scores_dir: Path, settings: FuseSettings, *, device: str) -> str:
    """What decides the coefficients: what a killed run has finished is used again only if it is the same."""
    records = scores.capabilities.values() if settings.rule == "refine" else ()
    scored = [text for record in records for text in record.scored]
    parts = {
        "scores": [hashlib.sha256((scores_dir / name).read_bytes()).hexdigest() for name in FILES],
        # what tokenizer and chat template make of the prompts, and what no weight shows
        "tokens": [family.chat.prompt_tokens(text) for text in scored],
        "run": run_facts(family, device=device),
        "settings": repr(settings),
        "held": family.engine.held_bytes,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def say_what_is_not_kept(scores: Scores, outcome: RuleOutcome) -> None:
    """Say where a retain set may lose more than is allowed, and where nobody has looked."""
    for name, most in outcome.beyond.items():
        text = "the merge loses up to %.3g nats per token on the retain set %s, and may lose %.3g (--tolerance)"
        logger.warning(text, most, name, outcome.tolerance)
    retained = [name for name, record in scores.capabilities.items() if record.retain]
    if outcome.standing is None and retained:
        text = "what the merge loses on the retain set %s was not read: with every scale given no merge is run"
        logger.warning(text, ", ".join(retained))


def _within(most: int, family: Family, scores: Scores, settings: FuseSettings) -> Family:
    """The models, held as a bound on memory allows."""
    steps = settings.rule == "refine"
    allowed = merging_budget(
        family.layout,
        len(family.experts),
        most=most,
        longest=max(TOKENS_PER_ROW, _longest(family, scores, scored=steps)),
        resident=family.resident,
        stored_bytes=family.stored_bytes,
        gradients=steps,
    )
    return bounded(family, allowed)


def _longest(family: Family, scores: Scores, *, scored: bool) -> int:
    """Tokens of the longest prompt with its reply: of the held-out ones and, if asked for, of those scored on."""
    records = scores.capabilities.values()
    lengths = [len(each) for record in records for each in record.held_out.sequences]
    if scored:
        limit = reference_limit(scores)
        lengths += [len(family.chat.prompt_tokens(text)) + limit for record in records for text in record.scored]
    return max(lengths, default=0)


def _weight_bytes(base: Checkpoint, dtype: Dtype | None) -> int:
    return sum(info.numel * job_dtype(info.dtype, dtype).itemsize for info in base.tensors.values())


def scored_vocabulary(scores: Scores) -> Literal["base"] | None:
    """What scoring did with experts whose vocabulary is larger than the base's."""
    return "base" if (scores.provenance.get("settings") or {}).get("vocab") == "base" else None


def open_scored_family(
    scores: Scores, models: dict[str, str], *, device: str, resident: bool, trust_remote_code: bool
) -> Family:
    """Open the scores' models where they live now.

    Raises:
        RecipeError: a name that the scores do not have, or another checkpoint in a scored one's place.
    """
    if unknown := sorted(set(models) - {BASE, *scores.experts}):
        raise RecipeError("the scores have no such model", got=unknown[0], expected=", ".join([BASE, *scores.experts]))
    family = open_family(
        models.get(BASE, scores.base.source),
        {name: models.get(name, expert.source) for name, expert in scores.experts.items()},
        device=device,
        resident=resident,
        vocab=scored_vocabulary(scores),
        trust_remote_code=trust_remote_code,
    )
    recorded: dict[str, InputModel] = {BASE: scores.base, **scores.experts}
    for name, checkpoint in {BASE: family.base, **family.experts}.items():
        if (found := checkpoint.content_hash()) != recorded[name].content_hash:
            raise RecipeError(
                f"{name} is not the checkpoint that was scored",
                where=checkpoint.path,
                got=found,
                expected=recorded[name].content_hash,
                mend=f"say where the original lives with --model {name}=PATH, or score again",
            )
    return family
