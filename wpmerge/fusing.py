"""From Scores to a merged checkpoint: the work behind ``wpmerge fuse``."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from wpmerge.arch import Layout
from wpmerge.attribution import UnitArrays, empty_arrays
from wpmerge.calibration import HeldOutReading, merged_source, read_held_out, retention, search_scales
from wpmerge.checkpoint import Checkpoint
from wpmerge.coefficients import (
    MAX_COEFFICIENT,
    Rule,
    RuleSettings,
    apply_rule,
    make_grouping,
    stack_scores,
    tensor_coefficients,
)
from wpmerge.errors import CapabilityError, RecipeError
from wpmerge.merge import SHARD_BYTES, MergeSummary, merge
from wpmerge.models import Family, open_family
from wpmerge.output import check_output, check_space, output_directory, write_file
from wpmerge.plan import BASE, Coefficient, Granularity, InputModel, Plan, input_model
from wpmerge.provenance import provenance
from wpmerge.readings import Progress
from wpmerge.readouts import LogProbReadout
from wpmerge.recipe import check_with_mergekit, recipe_text
from wpmerge.rows import pack
from wpmerge.scores import Scores, load_scores
from wpmerge.streaming import job_dtype

TOKENS_PER_ROW = 384


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseSettings:
    """What ``wpmerge fuse`` may be told about coefficients.

    Attributes:
        rule: how scores become coefficients.
        granularity: what shares a coefficient; None takes "expert" for uniform and scaled, "unit" for the others.
        scales: expert → scale; "" stands for all. Empty: chosen on held-out prompts.
        power: p of ``proportional``.
        density: ρ of ``select``.
        floor: of ``select``, as a share of the scale.
        max_coefficient: λ_max.
        evaluations: merges run on the held-out prompts to choose the scales, at least 1.
        seed: recorded; nothing here is drawn at random.

    Raises:
        RecipeError: ``select`` at granularity "expert", where there is nothing to select among.
    """

    rule: Rule = "scaled"
    granularity: Granularity | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    power: float = 0.5
    density: float = 0.2
    floor: float = 0.3
    max_coefficient: float = MAX_COEFFICIENT
    evaluations: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule == "select" and self.granularity == "expert":
            raise RecipeError(
                "rule select has nothing to select among at granularity expert",
                expected="unit, block or tensor",
                mend="use another granularity, or --rule scaled",
            )

    @property
    def rule_settings(self) -> RuleSettings:
        """The rule and its numbers."""
        return RuleSettings(
            rule=self.rule,
            power=self.power,
            density=self.density,
            floor=self.floor,
            max_coefficient=self.max_coefficient,
        )

    @property
    def level(self) -> Granularity:
        """The granularity, with its default."""
        if self.granularity is not None:
            return self.granularity
        return "expert" if self.rule in ("uniform", "scaled") else "unit"


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseResult:
    """What a fusion decided and wrote.

    Attributes:
        plan: every coefficient.
        scales: s_e.
        retention: capability → fraction of the gap kept on the held-out prompts; empty if the scales were given.
        summary: of the merge; None if only the plan was asked for.
        out: the directory.
    """

    plan: Plan
    scales: Mapping[str, float]
    retention: Mapping[str, float]
    summary: MergeSummary | None
    out: Path


def fuse(
    scores_dir: Path,
    out: Path,
    *,
    settings: FuseSettings | None = None,
    models: Mapping[str, str] | None = None,
    plan_only: bool = False,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    threads: int = 1,
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
        plan_only: stop before the weights.
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
    rule = settings.rule_settings
    tell: Progress = progress or (lambda *_: None)
    scores = load_scores(scores_dir)
    check_output(out, inputs=[scores_dir], overwrite=overwrite)
    family = _open(scores, dict(models or {}), device=device, resident=resident, trust_remote_code=trust_remote_code)
    checkpoints = {BASE: family.base, **family.experts}
    inputs = [scores_dir, *(checkpoint.path for checkpoint in checkpoints.values())]
    check_output(out, inputs=inputs, overwrite=overwrite)
    if not plan_only:  # before minutes are spent on choosing scales
        check_space(out, total=_weight_bytes(family.base, dtype))
    grouping = make_grouping(family.layout, settings.level)
    stacked = stack_scores(
        family.layout, grouping, [_own_scores(scores, name, family.layout) for name in scores.experts]
    )

    def coefficients(scales: Mapping[str, float]) -> dict[str, dict[str, Coefficient]]:
        ordered = torch.tensor([scales[name] for name in scores.experts], dtype=torch.float64)
        values = apply_rule(rule, stacked, grouping.sizes, ordered)
        return {
            name: tensor_coefficients(family.layout, grouping, values[number])
            for number, name in enumerate(scores.experts)
        }

    scales = _given_scales(settings, scores)
    kept: dict[str, float] = {}
    if scales is None:
        scales, kept = _choose_scales(family, scores, settings, coefficients, tell)
    plan = Plan(
        base=input_model(family.base),
        experts={name: input_model(expert) for name, expert in family.experts.items()},
        coefficients=coefficients(scales),
        rule=settings.rule,
        granularity=settings.level,
        provenance=provenance(settings, started, scales=scales, held_out_retention=kept, device=device),
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
            progress=lambda done, total: tell("writing", done, total),
        )
    return FuseResult(plan=plan, scales=scales, retention=kept, summary=summary, out=out)


def _weight_bytes(base: Checkpoint, dtype: torch.dtype | None) -> int:
    return sum(info.numel * job_dtype(info.dtype, dtype).itemsize for info in base.tensors.values())


def _own_scores(scores: Scores, name: str, layout: Layout) -> UnitArrays:
    """An expert's recoveries on its own capability; NaN for kinds of units that were left out of the scoring."""
    found = empty_arrays(layout)
    for kind in found:
        if f"linear/{name}/{name}/{kind}" in scores.arrays:
            found[kind] = scores.array(name, name, kind)
    return found


def _open(scores: Scores, models: dict[str, str], *, device: str, resident: bool, trust_remote_code: bool) -> Family:
    """Open the scores' models where they live now, and refuse others in their place."""
    if unknown := sorted(set(models) - {BASE, *scores.experts}):
        raise RecipeError("the scores have no such model", got=unknown[0], expected=", ".join([BASE, *scores.experts]))
    family = open_family(
        models.get(BASE, scores.base.source),
        {name: models.get(name, expert.source) for name, expert in scores.experts.items()},
        device=device,
        resident=resident,
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


def _given_scales(settings: FuseSettings, scores: Scores) -> dict[str, float] | None:
    """The scales the user gave; None if they are to be chosen."""
    if not settings.scales:
        return None
    if unknown := sorted(set(settings.scales) - {"", *scores.experts}):
        raise RecipeError("--scale names an unknown expert", got=unknown[0], expected=", ".join(scores.experts))
    common = settings.scales.get("")
    found = {name: settings.scales.get(name, common) for name in scores.experts}
    missing = [name for name, scale in found.items() if scale is None]
    if missing:
        raise RecipeError("--scale leaves an expert out", got=missing[0], mend=f"add --scale {missing[0]}=X")
    scales = {name: float(scale) for name, scale in found.items() if scale is not None}
    for name, scale in scales.items():
        if not 0.0 <= scale <= settings.max_coefficient:
            raise RecipeError(
                f"the scale of {name} is out of range", got=scale, expected=f"0 to {settings.max_coefficient}"
            )
    if settings.rule == "uniform" and len(set(scales.values())) > 1:
        raise RecipeError("rule uniform has one scale for all experts", got=scales, mend="use --rule scaled")
    return scales


def _choose_scales(
    family: Family,
    scores: Scores,
    settings: FuseSettings,
    coefficients: Callable[[Mapping[str, float]], dict[str, dict[str, Coefficient]]],
    tell: Progress,
) -> tuple[dict[str, float], dict[str, float]]:
    """Run merges on the held-out prompts that the scores kept, and take the scales with the largest utility."""
    engine, base = family.engine, family.weights[""]
    experts = {name: family.weights[name] for name in scores.experts}
    tell("choosing scales", 0, settings.evaluations)
    readings: dict[str, HeldOutReading] = {}
    for name, capability in scores.capabilities.items():
        held = capability.held_out
        sequences = [list(sequence) for sequence in held.sequences]
        readout = LogProbReadout(layer=family.layout.layers - 1, sequences=sequences, starts=held.starts)
        rows = pack(sequences, tokens_per_row=TOKENS_PER_ROW)
        readings[name] = read_held_out(engine, base, experts[name], readout, rows)
        if readings[name].expert <= readings[name].base:
            raise CapabilityError(
                f"on the held-out prompts the expert {name} is no better than the base",
                got=f"{readings[name].expert:.4g} and {readings[name].base:.4g} nats per token",
                mend="score with more held-out prompts (--held-out), or give scales with --scale",
            )
    done = 0

    def evaluate(scales: dict[str, float]) -> dict[str, float]:
        nonlocal done
        kept = retention(engine, merged_source(engine, base, experts, coefficients(scales)), readings)
        done += 1
        tell("choosing scales", done, settings.evaluations)
        return kept

    return search_scales(
        list(experts),
        evaluate,
        evaluations=settings.evaluations,
        together=settings.rule == "uniform",
        highest=settings.max_coefficient,
    )
