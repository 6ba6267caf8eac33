"""Coefficients by steps on what the merge itself does: rule ``refine``.

At the merge of the moment, one forward and one backward run of all capabilities' prompts give ∂U/∂λ for every expert
and every group of parameters at once. A step follows the gradient of the utility Σ_f log(ε + min(1, R̂_f)) on a batch of
prompts, as far as two halves of it agree; prompts that no step sees decide where to stop (docs/method.md, "From scores
to a merge"). Retain sets have their say afterwards (:mod:`wpmerge.retaining`).

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
from wpmerge.coefficients import Grouping, group_scores, squared_norms, tensor_coefficients
from wpmerge.engine import Engine
from wpmerge.gradients import Term, directional_sums
from wpmerge.levels import Halves, Levels, Parts, RefineSettings, direction, make_levels, no_parts, together
from wpmerge.memory import FLOAT, stream_per_token
from wpmerge.pieces import Forget, Keeper
from wpmerge.plan import Added, Coefficient, Steps
from wpmerge.readouts import LogProbReadout, ReplyReadout, measure
from wpmerge.rows import Row, pack, row_groups
from wpmerge.weights import Weights, WeightSource

TOKENS_PER_ROW = 384
HALVES = 2
"""Of a step's prompts: a step goes as far as they agree."""
STEP_BYTES = 1 << 29
"""Residual streams that a step holds at once, bytes; those of half of one capability's prompts at least.
A bound of the user's on memory stands in its place."""
LEAST_KEPT = 0.05
"""Retention below which a lost skill pulls no harder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A look at the held-out prompts."""

    step: int
    averaged: bool
    standing: Standing
    worth: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refined:
    """Where ``refine`` stopped.

    Attributes:
        coefficients: λ.
        parts: what was added to the start; λ is their sum, clipped to [0, λ_max], times the factors.
        standing: of the merge on the held-out prompts.
        checks: every look at them, until retain sets had a say; the first is the start's, the best one's coefficients
            are returned.
        best: number of the best of ``checks``.
        factors: expert → what its coefficients were multiplied with for retain sets; empty where that took nothing.
    """

    coefficients: Float[Tensor, "E G"]
    parts: Parts
    standing: Standing
    checks: tuple[Check, ...]
    best: int
    factors: Mapping[str, float] = field(default_factory=dict)

    def steps(self, experts: Sequence[str]) -> Steps:
        """What was added to each expert's start, as a plan keeps it."""
        parts, best = self.parts, self.checks[self.best]
        added = {
            name: Added(
                expert=float(whole.float()),
                block=block.float(),
                group=group.float(),
                factor=self.factors.get(name, 1.0),
            )
            for name, whole, block, group in zip(experts, parts.expert[:, 0], parts.block, parts.group, strict=True)
        }
        return Steps(step=best.step, averaged=best.averaged, added=added)


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

    def slopes(self, merged: WeightSource, terms: Sequence[Term]) -> Float[Tensor, "2 E G"]:
        """∂/∂λ of the sums of two halves of terms at a merge, from one forward and one backward run."""
        kinds: tuple[Kind, ...] = KINDS if self.grouping.granularity == "unit" else ("tensor", *MODEL_KINDS)
        experts = list(self.experts.values())
        sums = directional_sums(self.engine, merged, self.base, experts, terms, totals=HALVES, kinds=kinds)
        return torch.stack([torch.stack([self._grouped(arrays) for arrays in own]) for own in sums])

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
        prompts: per capability what steps are taken on: references, each half of a batch by itself.
        held_out: what decides where to stop; no step sees it.
        settings: see :class:`RefineSettings`.
        progress: called with the steps done and in all.

    Returns:
        Never worse than the start on the held-out prompts.
    """
    levels = make_levels(settings, merging.layout, merging.grouping, merging.norms(), start)
    draws = {
        name: _Draw(count=reading.readout.items, chance=random.Random(f"{settings.seed}/{name}"))
        for name, reading in prompts.items()
    }
    walk = _Walk(merging, levels, held_out, settings)
    walk.look(no_parts(levels), 0)
    for step in range(settings.steps):
        if progress is not None:
            progress(step, settings.steps)
        taken = {name: draw.take(settings.batch) for name, draw in draws.items()}
        walk.step(_batch_slopes(merging, together(levels, walk.parts), prompts, taken), step)
    if progress is not None:
        progress(settings.steps, settings.steps)
    return walk.result()


def _batch_slopes(
    merging: Merging,
    values: Float[Tensor, "E G"],
    prompts: Mapping[str, HeldOutReading],
    taken: Mapping[str, Sequence[int]],
) -> Halves:
    """The utility's gradient at a merge on a batch of prompts; read once, even if the run is killed and repeated."""
    key = f"step-{_digest(values, [(name, _tokens(prompts[name]), list(items)) for name, items in taken.items()])}"
    if (found := merging.kept.get(key)) is not None:
        one, other = found["slopes"]
        return one, other
    terms = [
        _term(reading, taken[name][half::HALVES] or taken[name], half)
        for name, reading in prompts.items()
        for half in range(HALVES)
    ]
    slopes = _slopes(merging, merging.source(values), terms)
    merging.kept.put(key, {"slopes": torch.stack(slopes)})
    return slopes


def _tokens(reading: HeldOutReading) -> list[list[int]]:
    assert isinstance(reading.readout, (LogProbReadout, ReplyReadout)), "merges are read on references"
    return [list(each) for each in reading.readout.sequences]


def _digest(values: Float[Tensor, "E G"], asked: object) -> str:
    """A key: equal for the same coefficients and the same prompts."""
    digest = hashlib.sha256(json.dumps(asked).encode())
    digest.update(values.double().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _slopes(merging: Merging, merged: WeightSource, terms: Sequence[Term]) -> Halves:
    """The gradient on each half of the prompts, in as many runs as memory asks for."""
    fitting = [part for term in terms for part in _divided(merging, merged, term)]
    one, other = torch.stack([merging.slopes(merged, run) for run in _together(merging, fitting)]).sum(dim=0)
    return one, other


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


def _term(reading: HeldOutReading, items: Sequence[int], half: int) -> Term:
    """Some prompts of a capability: their part of the utility."""
    assert isinstance(reading.readout, (LogProbReadout, ReplyReadout)), "steps are taken on references"
    assert reading.expert_items is not None, "a capability has an expert"
    readout = reading.readout.some(items)
    before = reading.base_items[list(items)]
    weigh = partial(_weigh_skill, before=before, gap=float((reading.expert_items[list(items)] - before).mean()))
    return Term(rows=pack(readout.sequences, tokens_per_row=TOKENS_PER_ROW), readout=readout, weigh=weigh, total=half)


def _weigh_skill(
    values: Float[Tensor, " items"], *, before: Float[Tensor, " items"], gap: float
) -> Float[Tensor, " items"]:
    """∂U/∂ of each prompt's number: the more, the less of the skill there is; nothing once it is whole."""
    share = float((values.double().cpu() - before).mean()) / gap if gap > 0 else 1.0
    pull = 0.0 if share >= 1.0 else 1.0 / (gap * (EPSILON + max(LEAST_KEPT, share)))
    return torch.full_like(before, pull / len(before))


class _Walk:
    """The state of the steps: where they are, which way they go, and the best that was seen."""

    def __init__(
        self, merging: Merging, levels: Levels, held_out: Mapping[str, HeldOutReading], settings: RefineSettings
    ) -> None:
        self._merging, self._levels, self._held_out, self._settings = merging, levels, held_out, settings
        self.parts = no_parts(levels)
        self._way = no_parts(levels)
        self._sum, self._summed = no_parts(levels), 0
        self._rate = settings.rate
        self._checks: list[Check] = []
        self._best = (-math.inf, self.parts)
        self._best_check = 0

    def look(self, parts: Parts, step: int, *, averaged: bool = False) -> float:
        """Judge by the held-out prompts, and remember the best; the earlier of equals."""
        standing = self._merging.assess(together(self._levels, parts), self._held_out)
        worth = utility(standing.kept)
        self._checks.append(Check(step=step, averaged=averaged, standing=standing, worth=worth))
        if worth > self._best[0]:
            self._best, self._best_check = (worth, parts), len(self._checks) - 1
        return worth

    def step(self, halves: Halves, number: int) -> None:
        """Move, and look at the held-out prompts when it is time; from where they got worse, go back and go slower.

        Args:
            halves: ∂U on two halves of the prompts.
            number: of the step.
        """
        settings = self._settings
        rate = self._rate * (1.0 - number / settings.steps)
        aim = direction(self._levels, halves, together(self._levels, self.parts))
        self._way = no_parts(self._levels).plus(self._way, settings.momentum).plus(aim, 1.0 - settings.momentum)
        self.parts = no_parts(self._levels).plus(self.parts, 1.0 - settings.ridge * rate).plus(self._way, rate)
        if number >= settings.steps // 2:
            self._sum, self._summed = self._sum.plus(self.parts, 1.0), self._summed + 1
        last = number + 1 == settings.steps
        if last or (number + 1) % settings.check == 0:
            best = self._best[0]
            if self.look(self.parts, number + 1) < best and not last:
                self.parts, self._way, self._rate = self._best[1], no_parts(self._levels), self._rate / 2
        if last and self._summed > 1:
            self.look(no_parts(self._levels).plus(self._sum, 1.0 / self._summed), number + 1, averaged=True)

    def result(self) -> Refined:
        """The best that was seen."""
        parts = self._best[1]
        return Refined(
            coefficients=together(self._levels, parts),
            parts=parts,
            standing=self._checks[self._best_check].standing,
            checks=tuple(self._checks),
            best=self._best_check,
        )
