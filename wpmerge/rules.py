"""One entry for every rule: from scores and held-out prompts to the coefficients of a merge.

``wpmerge fuse`` and the benchmark take coefficients from here, so that what is compared is what is merged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.calibration import (
    GRID,
    TOLERANCE,
    HeldOutReading,
    Standing,
    Tunable,
    scale_tunables,
    search_numbers,
)
from wpmerge.coefficients import (
    MAX_COEFFICIENT,
    Grouping,
    Rule,
    RuleSettings,
    apply_rule,
    make_grouping,
    stack_scores,
)
from wpmerge.errors import RecipeError, check_ranges
from wpmerge.joint import JointProblem, JointSolution, solve_joint
from wpmerge.models import Family
from wpmerge.pieces import Forget, Keeper, Pieces
from wpmerge.plan import Coefficient, Granularity
from wpmerge.readings import Progress
from wpmerge.refining import Merging, Refined, RefineSettings, refine
from wpmerge.retaining import keep_to_retain_sets
from wpmerge.scores import Scores
from wpmerge.tuning import check_cross, check_scored, effects_of, held_out_readings, own_scores, scored_readings

SCALE = "scale."
"""What the names of scales begin with among the numbers of a search."""

SCORED: tuple[Rule, ...] = ("proportional", "select", "joint")
"""Rules that turn scores into coefficients; the others need prompts alone."""

OWN_NUMBERS: Mapping[Rule, tuple[Tunable, ...]] = {
    "proportional": (Tunable(names=("power",), high=4.0, grid=(0.0, 0.25, 0.5, 1.0)),),
    "select": (
        Tunable(names=("density",), high=1.0, grid=(0.2, 0.5)),
        Tunable(names=("floor",), high=1.0, grid=(0.3, 0.6, 1.0)),
    ),
    "joint": (Tunable(names=("mu",), low=1e-3, high=1e3, grid=(0.1, 1.0, 10.0, 1e3), steps=(1.0, 0.5), factor=True),),
}
"""A rule's numbers that ``calibrate`` chooses beside the scales. Each grid has the value at which scores count for
nothing (of ``joint``, for next to nothing beside retain sets), so that scores which mislead can be found out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseSettings:
    """What ``wpmerge fuse`` may be told about coefficients.

    Attributes:
        rule: how scores become coefficients.
        granularity: what shares a coefficient; None takes "expert" for uniform and scaled, "unit" for the others.
        scales: expert → scale; "" stands for all. Empty: chosen on held-out prompts.
        calibrate: choose the rule's own numbers there too: p of ``proportional``, ρ and floor of ``select``, μ of
            ``joint``.
        power: p of ``proportional``.
        density: ρ of ``select``.
        floor: of ``select``, as a share of the scale.
        mu: μ of ``joint``.
        steps: of ``refine``.
        batch: prompts per capability and step of ``refine``.
        ridge: of ``refine``, see :class:`~wpmerge.refining.RefineSettings`.
        tolerance: what a merge may lose on a retain set, nats per token, a standard error over its questions included.
        max_coefficient: λ_max.
        evaluations: merges run on the held-out prompts to choose the numbers, at least 1. On top come what ``refine``
            needs to look where its steps are, and with retain sets 16 merges for factors, from six experts on more.
        seed: of ``refine``'s batches.
        max_memory: what the process's resident memory is planned to stay within, bytes; None for no limit.

    Raises:
        RecipeError: ``select`` at granularity "expert", where there is nothing to select among; a number out of range.
    """

    rule: Rule = "refine"
    granularity: Granularity | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    calibrate: bool = False
    power: float = 0.5
    density: float = 0.2
    floor: float = 0.3
    mu: float = 1.0
    steps: int = 16
    batch: int = 8
    ridge: float = 0.0
    tolerance: float = TOLERANCE
    max_coefficient: float = MAX_COEFFICIENT
    evaluations: int = 24
    seed: int = 0
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.rule == "select" and self.granularity == "expert":
            raise RecipeError(
                "rule select has nothing to select among at granularity expert",
                expected="unit, block or tensor",
                mend="use another granularity, or --rule scaled",
            )
        check_ranges(self, {"tolerance": (1e-9, 1e9)})

    @property
    def rule_settings(self) -> RuleSettings:
        """The rule and its numbers."""
        return RuleSettings(
            rule=self.rule,
            power=self.power,
            density=self.density,
            floor=self.floor,
            mu=self.mu,
            max_coefficient=self.max_coefficient,
        )

    @property
    def refine_settings(self) -> RefineSettings:
        """The numbers of ``refine``."""
        return RefineSettings(
            steps=self.steps,
            batch=self.batch,
            ridge=self.ridge,
            max_coefficient=self.max_coefficient,
            seed=self.seed,
        )

    @property
    def reads_models(self) -> bool:
        """Whether models' weights are read to choose coefficients: to run merges, or for task vectors' norms."""
        return self.rule in ("refine", "joint") or self.calibrate or not self.scales

    @property
    def level(self) -> Granularity:
        """The granularity, with its default."""
        if self.granularity is not None:
            return self.granularity
        return "expert" if self.rule in ("uniform", "scaled") else "unit"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RuleOutcome:
    """What a rule decided, and on what grounds.

    Attributes:
        coefficients: expert → tensor name as the checkpoint stores it → coefficient.
        values: λ, before it was laid out over tensors.
        grouping: what shares a coefficient.
        settings: the rule and its numbers, as chosen.
        scales: s_e.
        own: each group's recovery from each expert on its own capability.
        effects: capability or retain set → each group's effect from each expert: a fraction of the gap, or nats per
            token.
        standing: of the merge on the held-out prompts; None if nothing was run there.
        evaluations: merges that were run on them.
        tolerance: what a merge may lose on a retain set, nats per token.
        joint: the solution, under that rule.
        refined: where the steps ended, under that rule.
        factors: expert → what its coefficients were multiplied with for retain sets, under that rule.
    """

    coefficients: Mapping[str, Mapping[str, Coefficient]]
    values: Float[Tensor, "E G"]
    grouping: Grouping
    settings: RuleSettings
    scales: Mapping[str, float]
    own: Float[Tensor, "E G"]
    effects: Mapping[str, Float[Tensor, "E G"]]
    standing: Standing | None
    evaluations: int
    tolerance: float
    joint: JointSolution | None = None
    refined: Refined | None = None
    factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def unscored(self) -> int:
        """How many groups no score reaches: under a rule that weighs scores they take the expert's scale."""
        return int(self.own.isnan().any(dim=0).sum()) if self.settings.rule in SCORED else 0

    @property
    def beyond(self) -> dict[str, float]:
        """Retain sets that may lose more than the tolerance, by the prompts that decide: how much, nats per token."""
        most = {} if self.standing is None else self.standing.most
        return {name: value for name, value in most.items() if value > self.tolerance}

    @property
    def record(self) -> dict[str, Any]:
        """The chosen numbers, for a plan's provenance."""
        found: dict[str, Any] = {"scales": dict(self.scales), "evaluations": self.evaluations}
        if self.unscored:
            found["groups without a score"] = self.unscored
        if self.standing is not None:
            found |= {"held_out_retention": dict(self.standing.kept), "held_out_lost": dict(self.standing.lost)}
            if self.standing.errors:
                found["held_out_lost_error"] = dict(self.standing.errors)
        for name in {name for tunable in OWN_NUMBERS.get(self.settings.rule, ()) for name in tunable.names}:
            found[name] = getattr(self.settings, name)
        if self.joint is not None:
            found |= {"predicted": self.joint.predicted.tolist(), "kkt_residual": self.joint.residual}
        if self.refined is not None:
            found["checks"] = [[check.step, round(check.worth, 6)] for check in self.refined.checks]
            found["best_check"] = self.refined.best
        if self.factors:
            found["factors"] = dict(self.factors)
        return found


def coefficients_for(
    settings: FuseSettings,
    family: Family,
    scores: Scores,
    *,
    experts: Sequence[str] | None = None,
    held_out: Callable[[], Mapping[str, HeldOutReading]] | None = None,
    prompts: Callable[[], Mapping[str, HeldOutReading]] | None = None,
    pieces: Pieces | None = None,
    progress: Progress | None = None,
) -> RuleOutcome:
    """Choose the coefficients of a merge.

    Args:
        settings: the rule, its numbers, and which of them are to be chosen.
        family: the models.
        scores: of these models.
        experts: which of them are merged; None for all.
        held_out: gives the prompts that choose numbers and stop ``refine``; None takes those that the scores kept.
        prompts: gives the prompts that ``refine`` takes steps on; None takes those that were scored.
        pieces: keeps what is finished, so that a killed run goes on; None keeps it nowhere.
        progress: told what is being done.

    Raises:
        RecipeError: scales that cannot be meant; ``joint`` without cross effects.
        CapabilityError: an expert that is no better than the base on the held-out prompts.
    """
    tell: Progress = progress or (lambda *_: None)
    names = tuple(experts or scores.experts)
    rule = _Rule(settings, family, scores, names, Forget() if pieces is None else pieces)
    given = given_scales(settings, names)
    if given is not None and settings.rule != "refine" and not settings.calibrate:
        return rule.outcome(given, settings.rule_settings, standing=None, evaluations=0)
    tell("choosing scales", 0, settings.evaluations)
    readings = held_out() if held_out is not None else held_out_readings(family, scores, names)
    if settings.rule != "refine":
        scales, numbers, standing, used = _choose(rule, readings, given, tell)
        return rule.outcome(scales, numbers, standing=standing, evaluations=used)
    skills = _skills(readings)
    scales, numbers, _, used = _choose(rule, skills, given, tell)
    tell("refining", 0, settings.steps)
    steps_on = prompts() if prompts is not None else scored_readings(family, scores, names, pieces=pieces)
    refined = refine(
        rule.merging,
        rule.values(scales, numbers),
        _skills(steps_on),
        skills,
        settings.refine_settings,
        progress=lambda done, total: tell("refining", done, total),
    )
    used += len(refined.checks)
    if len(skills) < len(readings):
        refined, tried = keep_to_retain_sets(
            rule.merging,
            refined,
            steps_on,
            readings,
            tolerance=settings.tolerance,
            evaluations=settings.evaluations - used,
            progress=lambda done, total: tell("keeping to the retain sets", done, total),
        )
        used += tried
    return rule.outcome(scales, numbers, standing=refined.standing, evaluations=used, refined=refined)


def _skills(readings: Mapping[str, HeldOutReading]) -> dict[str, HeldOutReading]:
    """All but the retain sets."""
    return {name: each for name, each in readings.items() if not each.retain}


class _Rule:
    """A rule with its scores at hand: numbers → coefficients."""

    def __init__(
        self, settings: FuseSettings, family: Family, scores: Scores, experts: tuple[str, ...], kept: Keeper
    ) -> None:
        self.settings, self.experts = settings, experts
        self.grouping = make_grouping(family.layout, settings.level)
        weights = {name: family.weights[name] for name in experts}
        self.merging = Merging(
            engine=family.engine,
            base=family.weights[""],
            experts=weights,
            grouping=self.grouping,
            resident=family.resident,
            kept=kept,
        )
        layout = family.layout
        self.own = stack_scores(layout, self.grouping, [own_scores(scores, name, layout) for name in experts])
        self.effects = effects_of(scores, layout, self.grouping, experts)
        self._retain = [name for name, record in scores.capabilities.items() if record.retain and name in self.effects]
        self._shares: Tensor | None = None
        if settings.rule in SCORED:
            check_scored(self.own, experts)
        if settings.rule == "joint":
            check_cross(scores, layout, experts)
            norms = self.merging.norms()
            self._shares = norms / norms.sum(dim=1, keepdim=True).clamp_min(1e-30)

    def values(self, scales: Mapping[str, float], numbers: RuleSettings) -> Float[Tensor, "E G"]:
        solution = self.solve(scales, numbers)
        if solution is not None:
            return solution.coefficients
        ordered = torch.tensor([scales[name] for name in self.experts], dtype=torch.float64)
        return apply_rule(numbers, self.own, self.grouping.sizes, ordered)

    def solve(self, scales: Mapping[str, float], numbers: RuleSettings) -> JointSolution | None:
        """Of ``joint``; None under another rule."""
        if self._shares is None:
            return None
        retain = [self.effects[name] for name in self._retain]
        return solve_joint(
            JointProblem(
                effects=torch.stack([self.effects[name] for name in self.experts]),
                own=tuple(range(len(self.experts))),
                scales=torch.tensor([scales[name] for name in self.experts], dtype=torch.float64),
                weights=self._shares,
                mu=numbers.mu,
                highest=numbers.max_coefficient,
                retain=torch.stack(retain) if retain else self.own.new_zeros(0, *self.own.shape),
                tolerance=self.settings.tolerance,
            )
        )

    def assess(
        self, scales: Mapping[str, float], numbers: RuleSettings, readings: Mapping[str, HeldOutReading]
    ) -> Standing:
        return self.merging.assess(self.values(scales, numbers), readings)

    def outcome(
        self,
        scales: Mapping[str, float],
        numbers: RuleSettings,
        *,
        standing: Standing | None,
        evaluations: int,
        refined: Refined | None = None,
    ) -> RuleOutcome:
        solution = self.solve(scales, numbers)
        if refined is not None:
            values = refined.coefficients
        else:
            values = self.values(scales, numbers) if solution is None else solution.coefficients
        return RuleOutcome(
            coefficients=self.merging.per_tensor(values),
            values=values,
            grouping=self.grouping,
            settings=numbers,
            scales=dict(scales),
            own=self.own,
            effects=self.effects,
            standing=standing,
            evaluations=evaluations,
            tolerance=self.settings.tolerance,
            joint=solution,
            refined=refined,
            factors={} if refined is None else refined.factors,
        )


def _choose(
    rule: _Rule, readings: Mapping[str, HeldOutReading], given: Mapping[str, float] | None, tell: Progress
) -> tuple[dict[str, float], RuleSettings, Standing, int]:
    """Scales, the rule's own numbers, what that is worth, and how many merges were run to find it."""
    settings, done = rule.settings, 0

    def numbers_at(point: Mapping[str, float]) -> tuple[dict[str, float], RuleSettings]:
        own: dict[str, Any] = {name: value for name, value in point.items() if not name.startswith(SCALE)}
        return {name: point[SCALE + name] for name in rule.experts}, replace(settings.rule_settings, **own)

    def evaluate(point: dict[str, float]) -> Standing:
        nonlocal done
        standing = rule.assess(*numbers_at(point), readings)
        done += 1
        tell("choosing scales", done, settings.evaluations)
        return standing

    tunables = [] if given is not None else _scale_tunables(settings, rule.experts)
    if settings.calibrate:
        own = OWN_NUMBERS.get(settings.rule, ())
        tunables = [*tunables[:1], *own, *tunables[1:]]
    start = {SCALE + name: (given or {}).get(name, GRID[1]) for name in rule.experts}
    start |= {name: getattr(settings, name) for tunable in tunables for name in tunable.names if name not in start}
    point, standing = search_numbers(
        start, tunables, evaluate, lambda each: each.worth(settings.tolerance), evaluations=settings.evaluations
    )
    return *numbers_at(point), standing, done


def _scale_tunables(settings: FuseSettings, experts: Sequence[str]) -> list[Tunable]:
    """``refine`` finds each expert's own scale by itself, and needs no more than a common start."""
    names = [SCALE + name for name in experts]
    if settings.rule == "refine":
        return [Tunable(names=tuple(names), high=settings.max_coefficient, grid=GRID, steps=())]
    return scale_tunables(names, together=settings.rule == "uniform", highest=settings.max_coefficient)


def given_scales(settings: FuseSettings, experts: Sequence[str]) -> dict[str, float] | None:
    """The scales the user gave; None if they are to be chosen.

    Raises:
        RecipeError: an expert unknown or left out, a scale out of range, several scales under ``uniform``.
    """
    if not settings.scales:
        return None
    if unknown := sorted(set(settings.scales) - {"", *experts}):
        raise RecipeError("--scale names an unknown expert", got=unknown[0], expected=", ".join(experts))
    common = settings.scales.get("")
    found = {name: settings.scales.get(name, common) for name in experts}
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
