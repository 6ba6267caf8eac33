"""Coefficients by steps on what the merge itself does: rule ``refine``.

At the merge of the moment, one forward and one backward run of all capabilities' prompts give ∂U/∂λ for every expert
and every group of parameters at once. A step follows the gradient of the utility Σ_f log(ε + min(1, R̂_f)) on a batch of
prompts, by a length that depends on neither the gradient's scale nor the number of groups; prompts that no step sees
decide where to stop (docs/method.md, "From scores to a merge"). Retain sets have their say afterwards
(:mod:`wpmerge.retaining`).

Shape suffixes: E experts, G groups.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.arch import KINDS, MODEL_KINDS, Kind, Layout
from wpmerge.attribution import UnitArrays
from wpmerge.calibration import EPSILON, HeldOutReading, Standing, assess, merged_source, utility
from wpmerge.coefficients import MAX_COEFFICIENT, Grouping, group_scores, squared_norms, tensor_coefficients
from wpmerge.engine import Engine
from wpmerge.errors import check_ranges
from wpmerge.gradients import Term, directional_sum
from wpmerge.memory import FLOAT, stream_per_token
from wpmerge.pieces import Forget, Keeper
from wpmerge.plan import Coefficient, Granularity
from wpmerge.readouts import LogProbReadout, ReplyReadout, measure
from wpmerge.rows import Row, pack, row_groups
from wpmerge.weights import Weights, WeightSource

TOKENS_PER_ROW = 384
STEP_BYTES = 1 << 29
"""Residual streams that a step holds at once, bytes; those of one capability's prompts at least.
A bound of the user's on memory stands in its place."""
LEAST_KEPT = 0.05
"""Retention below which a lost skill pulls no harder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineSettings:
    """The numbers of ``refine``.

    Attributes:
        steps: how many.
        batch: prompts per capability and step.
        rate: how far coefficients move in the first step, their root mean square; it falls linearly to 0.
        ridge: pull back to the start: share of the way from it that a step of rate 1 takes away.
        check: steps between two looks at the held-out prompts.
        max_coefficient: λ_max.
        seed: of the batches.

    Raises:
        RecipeError: a number out of its range.
    """

    steps: int = 16
    batch: int = 8
    rate: float = 0.125
    ridge: float = 0.0
    check: int = 4
    max_coefficient: float = MAX_COEFFICIENT
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "steps": (0, 10_000),
            "batch": (1, 100_000),
            "rate": (1e-9, 100.0),
            "ridge": (0.0, 1.0),
            "check": (1, 10_000),
        }
        check_ranges(self, ranges)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A look at the held-out prompts.

    Attributes:
        step: after how many steps.
        standing: of the merge.
        worth: the utility.
    """

    step: int
    standing: Standing
    worth: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refined:
    """Where ``refine`` stopped.

    Attributes:
        coefficients: λ.
        standing: of the merge on the held-out prompts.
        checks: every look at them, until retain sets had a say; the first is the start's, the best one's coefficients
            are returned.
        best: number of the best of ``checks``.
        factors: expert → what its coefficients were multiplied with for retain sets; empty where that took nothing.
    """

    coefficients: Float[Tensor, "E G"]
    standing: Standing
    checks: tuple[Check, ...]
    best: int
    factors: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class _Draw:
    """Batches of prompts: every prompt once before any comes again."""

    count: int
    chance: random.Random
    left: list[int] = field(default_factory=list)

    def take(self, size: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < min(size, self.count):
            if not set(self.left) - set(taken):
                again = list(range(self.count))
                self.chance.shuffle(again)
                self.left = [*again, *self.left]  # what is left comes first: the end is drawn from
            place = max(i for i, item in enumerate(self.left) if item not in taken)
            taken.append(self.left.pop(place))
        return taken


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Once:
    """Weights that are mixed once and then held, where a model's weights fit into memory anyway."""

    source: WeightSource
    held: dict[int, Weights] = field(default_factory=dict)

    def layer(self, index: int) -> Weights:
        """The weights of one decoder layer, names relative to it."""
        if index not in self.held:
            self.held[index] = self.source.layer(index)
        return self.held[index]

    def outer(self, names: Sequence[str] | None = None) -> Weights:
        """The weights outside the layers, canonical names."""
        if -1 not in self.held:
            self.held[-1] = self.source.outer()
        return self.held[-1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Merging:
    """What is merged: models, and which parameters share a coefficient.

    Attributes:
        engine: runs the layers.
        base: the base's weights.
        experts: by name.
        grouping: what shares a coefficient.
        resident: hold a merge's weights while it is run several times; otherwise one layer of them.
        kept: keeps what was read of a merge, by its coefficients and the prompts: a killed run goes on from there.
    """

    engine: Engine
    base: WeightSource
    experts: Mapping[str, WeightSource]
    grouping: Grouping
    resident: bool = True
    kept: Keeper = field(default_factory=Forget)

    @property
    def layout(self) -> Layout:
        """The units."""
        return self.engine.layout

    def per_tensor(self, values: Float[Tensor, "E G"]) -> dict[str, dict[str, Coefficient]]:
        """Expert → tensor → coefficient."""
        return {
            name: tensor_coefficients(self.layout, self.grouping, values[number])
            for number, name in enumerate(self.experts)
        }

    def source(self, values: Float[Tensor, "E G"]) -> WeightSource:
        """The merge: held once it is made, or made wherever it is asked for."""
        merged = merged_source(self.engine, self.base, self.experts, self.per_tensor(values))
        return _Once(source=merged) if self.resident else merged

    def assess(self, values: Float[Tensor, "E G"], readings: Mapping[str, HeldOutReading]) -> Standing:
        """Where the merge with these coefficients stands; read once, even if the run is killed and repeated."""
        key = f"stood-{_digest(values, [(name, _tokens(each)) for name, each in readings.items()])}"
        if (found := self.kept.get(key)) is not None:
            return Standing.of(found, readings)
        standing = assess(self.engine, self.source(values), readings)
        self.kept.put(key, standing.arrays())
        return standing

    def norms(self) -> Float[Tensor, "E G"]:
        """‖Δ_e[g]‖²."""
        found = [squared_norms(self.layout, self.grouping, self.base, expert) for expert in self.experts.values()]
        return torch.stack(found)

    def slopes(self, merged: WeightSource, terms: Sequence[Term]) -> Float[Tensor, "E G"]:
        """∂/∂λ of a sum of terms at a merge, from one forward and one backward run."""
        kinds: tuple[Kind, ...] = KINDS if self.grouping.granularity == "unit" else ("tensor", *MODEL_KINDS)
        found = directional_sum(self.engine, merged, self.base, list(self.experts.values()), terms, kinds=kinds)
        return torch.stack([self._grouped(arrays) for arrays in found])

    def _grouped(self, arrays: UnitArrays) -> Float[Tensor, " G"]:
        if self.grouping.granularity == "unit":
            return torch.nan_to_num(group_scores(self.layout, self.grouping, arrays))
        total = torch.zeros(len(self.grouping.names), dtype=torch.float64)
        for index in range(self.layout.layers):
            for number, tensor in enumerate(self.layout.layer_tensors(index)):
                total[self.grouping.of_tensor[tensor]] += arrays["tensor"][index, number]
        seen: set[Kind] = set()
        for tensor in self.layout.outer_tensors():
            kind = self.layout.tensors[tensor].segments[0].kind
            if kind not in seen:  # a final norm's weight and bias are one unit: it counts where its weight does
                total[self.grouping.of_tensor[tensor]] += arrays[kind].sum()
            seen.add(kind)
        return total


def refine(
    merging: Merging,
    start: Float[Tensor, "E G"],
    prompts: Mapping[str, HeldOutReading],
    held_out: Mapping[str, HeldOutReading],
    settings: RefineSettings,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Refined:
    """Step from ``start`` along the measured utility's gradient; return the best that the held-out prompts have seen.

    Args:
        merging: what is merged.
        start: λ before the first step.
        prompts: per capability what steps are taken on: references.
        held_out: what decides where to stop; no step sees it.
        settings: see :class:`RefineSettings`.
        progress: called with the steps done and in all.

    Returns:
        Never worse than the start on the held-out prompts.
    """
    draws = {
        name: _Draw(count=reading.readout.items, chance=random.Random(f"{settings.seed}/{name}"))
        for name, reading in prompts.items()
    }
    walk = _Walk(merging, start, held_out, settings)
    for step in range(settings.steps):
        if progress is not None:
            progress(step, settings.steps)
        taken = {name: draw.take(settings.batch) for name, draw in draws.items()}
        walk.step(_batch_slopes(merging, walk.coefficients, prompts, taken), step)
    if progress is not None:
        progress(settings.steps, settings.steps)
    return walk.result()


def _batch_slopes(
    merging: Merging,
    values: Float[Tensor, "E G"],
    prompts: Mapping[str, HeldOutReading],
    taken: Mapping[str, Sequence[int]],
) -> Float[Tensor, "E G"]:
    """The utility's gradient at a merge on a batch of prompts; read once, even if the run is killed and repeated."""
    key = f"slopes-{_digest(values, [(name, _tokens(prompts[name]), list(items)) for name, items in taken.items()])}"
    if (found := merging.kept.get(key)) is not None:
        return found["slopes"]
    slopes = _slopes(merging, merging.source(values), [_term(each, taken[name]) for name, each in prompts.items()])
    merging.kept.put(key, {"slopes": slopes})
    return slopes


def _tokens(reading: HeldOutReading) -> list[list[int]]:
    assert isinstance(reading.readout, (LogProbReadout, ReplyReadout)), "merges are read on references"
    return [list(each) for each in reading.readout.sequences]


def _digest(values: Float[Tensor, "E G"], asked: object) -> str:
    """A key: equal for the same coefficients and the same prompts."""
    digest = hashlib.sha256(json.dumps(asked).encode())
    digest.update(values.double().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _slopes(merging: Merging, merged: WeightSource, terms: Sequence[Term]) -> Float[Tensor, "E G"]:
    """The gradient of a sum of terms, in as many runs as memory asks for."""
    fitting = [part for term in terms for part in _divided(merging, merged, term)]
    first, *others = _together(merging, fitting)
    total = merging.slopes(merged, first)
    for run in others:
        total += merging.slopes(merged, run)
    return total


def _divided(merging: Merging, merged: WeightSource, term: Term) -> list[Term]:
    """A term in parts that are each within the engine's bound on memory: what items count is found beforehand then."""
    held, readout = merging.engine.held_bytes, term.readout
    if held is None or term.weigh is None or _stream_bytes(merging, term.rows) <= held:
        return [term]
    assert isinstance(readout, (LogProbReadout, ReplyReadout)), "steps are taken on references"
    weights = term.weigh(measure(merging.engine, merged, term.rows, readout))
    parts = []
    for group in row_groups(term.rows, held // _stream_per_token(merging, term.rows)):
        items = [number for row in group for number in row.places]
        some = readout.some(items)
        rows = pack(some.sequences, tokens_per_row=TOKENS_PER_ROW)
        parts.append(replace(term, rows=rows, readout=some, weigh=partial(_known_weights, weights[items])))
    return parts


def _known_weights(weights: Float[Tensor, " items"], _: Float[Tensor, " items"]) -> Float[Tensor, " items"]:
    return weights


def _stream_per_token(merging: Merging, rows: Sequence[Row]) -> int:
    """Bytes that a token of some rows keeps while a step is taken: its stream at every layer, and the gradient."""
    return stream_per_token(merging.layout, merging.layout.layers + 2, max(row.tokens.numel() for row in rows))


def _stream_bytes(merging: Merging, rows: Sequence[Row]) -> int:
    """Of all tokens; without a bound of the user's on memory the streams alone."""
    tokens = sum(row.tokens.numel() for row in rows)
    if merging.engine.held_bytes is None:
        return FLOAT * tokens * merging.layout.hidden * (merging.layout.layers + 1)
    return tokens * _stream_per_token(merging, rows)


def _together(merging: Merging, terms: Sequence[Term]) -> list[list[Term]]:
    """Terms that are run together: within the engine's bound on memory, or :data:`STEP_BYTES`; one at a time where
    weights are not held."""
    most = STEP_BYTES if merging.engine.held_bytes is None else merging.engine.held_bytes
    found: list[list[Term]] = []
    held = 0
    for term in terms:
        size = _stream_bytes(merging, term.rows)
        if not found or not merging.resident or held + size > most:
            found.append([])
            held = 0
        found[-1].append(term)
        held += size
    return found


def _term(reading: HeldOutReading, items: Sequence[int]) -> Term:
    """Some prompts of a capability: their part of the utility."""
    assert isinstance(reading.readout, (LogProbReadout, ReplyReadout)), "steps are taken on references"
    assert reading.expert_items is not None, "a capability has an expert"
    readout = reading.readout.some(items)
    before = reading.base_items[list(items)]
    weigh = partial(_weigh_skill, before=before, gap=float((reading.expert_items[list(items)] - before).mean()))
    return Term(rows=pack(readout.sequences, tokens_per_row=TOKENS_PER_ROW), readout=readout, weigh=weigh)


def _weigh_skill(
    values: Float[Tensor, " items"], *, before: Float[Tensor, " items"], gap: float
) -> Float[Tensor, " items"]:
    """∂U/∂ of each prompt's number: the more, the less of the skill there is; nothing once it is whole."""
    share = float((values.double().cpu() - before).mean()) / gap if gap > 0 else 1.0
    pull = 0.0 if share >= 1.0 else 1.0 / (gap * (EPSILON + max(LEAST_KEPT, share)))
    return torch.full_like(before, pull / len(before))


def direction(
    slopes: Float[Tensor, "E G"],
    ease: Float[Tensor, "E G"],
    coefficients: Float[Tensor, "E G"],
    highest: float,
) -> Float[Tensor, "E G"]:
    """The step of rate 1: √n p ∂U / ‖p ∂U‖ over the n coefficients, whose root mean square is 1.

    What pushes a coefficient out of its bounds does not count.

    Args:
        slopes: ∂U/∂λ.
        ease: p.
        coefficients: λ.
        highest: λ_max.
    """
    outward = ((coefficients <= 0.0) & (slopes < 0.0)) | ((coefficients >= highest) & (slopes > 0.0))
    way = ease * slopes.masked_fill(outward, 0.0)
    return math.sqrt(way.numel()) * way / way.square().sum().sqrt().clamp_min(1e-30)


def make_ease(norms: Float[Tensor, "E G"], granularity: Granularity) -> Float[Tensor, "E G"]:
    """p: for units ∝ 1/‖Δ_e[u]‖ with mean 1 over an expert's, otherwise 1; 0 where the expert is the base.

    Args:
        norms: ‖Δ_e[g]‖².
        granularity: of the groups.
    """
    if granularity != "unit":
        return (norms > 0).double()
    ease = torch.where(norms > 0, norms.clamp_min(1e-30).rsqrt(), 0.0)
    return ease * norms.shape[1] / ease.sum(dim=1, keepdim=True).clamp_min(1e-30)


class _Walk:
    """The state of the steps: where they are, and the best that was seen."""

    def __init__(
        self,
        merging: Merging,
        start: Float[Tensor, "E G"],
        held_out: Mapping[str, HeldOutReading],
        settings: RefineSettings,
    ) -> None:
        self._merging, self._held_out, self._settings = merging, held_out, settings
        self._ease = make_ease(merging.norms(), merging.grouping.granularity)
        self._rate = settings.rate
        self._checks: list[Check] = []
        self._best = 0
        self._start = self.coefficients = self._best_coefficients = start.clamp(0.0, settings.max_coefficient)
        self._look(0)

    def _look(self, step: int) -> bool:
        """Judge by the held-out prompts, and remember the best; the earlier of equals.

        Returns:
            Whether it is no worse than the best before.
        """
        standing = self._merging.assess(self.coefficients, self._held_out)
        self._checks.append(Check(step=step, standing=standing, worth=utility(standing.kept)))
        best = self._checks[self._best].worth
        if self._checks[-1].worth > best:
            self._best, self._best_coefficients = len(self._checks) - 1, self.coefficients
        return self._checks[-1].worth >= best

    def step(self, slopes: Float[Tensor, "E G"], number: int) -> None:
        """Move, and look at the held-out prompts when it is time; from where they got worse, go back and go slower.

        Args:
            slopes: ∂U/∂λ.
            number: of the step.
        """
        settings = self._settings
        rate = self._rate * (1.0 - number / settings.steps)
        way = direction(slopes, self._ease, self.coefficients, settings.max_coefficient)
        kept = self._start + (1.0 - settings.ridge * rate) * (self.coefficients - self._start)
        self.coefficients = (kept + rate * way).clamp(0.0, settings.max_coefficient)
        due = (number + 1) % settings.check == 0 or number + 1 == settings.steps
        if due and not self._look(number + 1):
            self.coefficients, self._rate = self._best_coefficients, self._rate / 2

    def result(self) -> Refined:
        """The best that was seen."""
        return Refined(
            coefficients=self._best_coefficients,
            standing=self._checks[self._best].standing,
            checks=tuple(self._checks),
            best=self._best,
        )
