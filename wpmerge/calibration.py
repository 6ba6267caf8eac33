"""What a merge is worth on held-out prompts, and the search for its few global numbers: no generation, no benchmark.

Shape suffixes: E experts.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.engine import Engine
from wpmerge.errors import CapabilityError, RecipeError
from wpmerge.plan import Coefficient
from wpmerge.readouts import (
    LogProbReadout,
    Readout,
    final_states,
    measure,
    measure_all,
    read_states,
    reply_readout,
    run_together,
)
from wpmerge.rows import Row
from wpmerge.weights import MixedWeights, WeightSource

EPSILON = 0.01
"""ε of the utility Σ_f log(ε + min(1, R̂_f)): a lost skill costs much, but not everything."""
TOLERANCE = 0.02
"""How far a merge may fall below the base on a retain set's replies, nats per token."""
PENALTY = 4.0
"""What each further tolerance beyond the first costs, in units of the utility: more than a merge can win by it."""
GRID = (0.3, 0.5, 0.7, 0.9)
STEPS = (0.2, 0.1, 0.05)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOutReading:
    """A capability's readout on held-out prompts, and what base and expert give there.

    Attributes:
        readout: F.
        rows: the held-out prompts.
        base_items: each prompt's number for the base, in memory of the CPU.
        expert_items: for its own expert; None for a retain set, which has none.
    """

    readout: Readout
    rows: Sequence[Row]
    base_items: Float[Tensor, " items"]
    expert_items: Float[Tensor, " items"] | None

    @property
    def retain(self) -> bool:
        """Whether this is a retain set: what a merge must not lose."""
        return self.expert_items is None

    @property
    def base(self) -> float:
        """F(base)."""
        return float(self.base_items.mean())

    @property
    def expert(self) -> float:
        """F(its own expert); a retain set's own model is the base."""
        return self.base if self.expert_items is None else float(self.expert_items.mean())


def read_held_out(
    engine: Engine, base: WeightSource, expert: WeightSource | None, readout: Readout, rows: Sequence[Row]
) -> HeldOutReading:
    """Measure base and expert (None for a retain set) once, so that a merge is judged from its own run alone."""
    before, after = (
        None if source is None else measure(engine, source, rows, readout).double().cpu() for source in (base, expert)
    )
    assert before is not None
    return HeldOutReading(readout=readout, rows=rows, base_items=before, expert_items=after)


def check_better(expert: float, base: float, *, name: str, prompts: str, mend: str) -> None:
    """Refuse prompts on which an expert has nothing to show.

    Args:
        expert: its mean log-probability of the references, nats per token.
        base: the base's.
        name: the expert's.
        prompts: which ones they are.
        mend: what to do about it.

    Raises:
        CapabilityError: the expert is no better than the base.
    """
    if expert <= base:
        raise CapabilityError(
            f"on the {prompts} the expert {name} is no better than the base",
            got=f"{expert:.4g} and {base:.4g} nats per token",
            mend=mend,
        )


def read_replies(
    engine: Engine,
    base: WeightSource,
    expert: WeightSource,
    own: LogProbReadout,
    rows: Sequence[Row],
    *,
    name: str,
    prompts: str,
    mend: str,
) -> HeldOutReading:
    """How much of an expert's replies a merge would still give: :class:`~wpmerge.readouts.ReplyReadout`.

    Args:
        engine: runs both.
        base: gives least of them.
        expert: gives them whole.
        own: log-probabilities of the replies.
        rows: its sequences.
        name: see :func:`check_better`; ``prompts`` and ``mend`` too.

    Raises:
        CapabilityError: to the expert the replies are no likelier than to the base.
    """
    readout = reply_readout(engine, expert, rows, own)
    kept, before = (each.double().cpu() for each in measure_all(engine, base, rows, [readout, own]))
    after = torch.stack([each.double().mean() for each in readout.ceilings])
    check_better(float(after.mean()), float(before.mean()), name=name, prompts=prompts, mend=mend)
    return HeldOutReading(readout=readout, rows=rows, base_items=kept, expert_items=torch.ones_like(kept))


def merged_source(
    engine: Engine,
    base: WeightSource,
    experts: Mapping[str, WeightSource],
    coefficients: Mapping[str, Mapping[str, Coefficient]],
) -> MixedWeights:
    """base + Σ_e coefficient[e] · (expert_e − base), made where it is asked for; nothing is stored.

    Args:
        engine: knows the names; its device is where the sum is made.
        base: the base's weights.
        experts: by name.
        coefficients: expert → tensor name as the checkpoint stores it → coefficient.
    """
    names = list(experts)
    stored = engine.layout.stored

    def mix(name: str, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        merged = tensors[0].clone()
        for expert, tensor in zip(names, tensors[1:], strict=True):
            coefficient = coefficients[expert][stored[name]].expand(tensor.shape).to(tensor)
            merged += (tensor - tensors[0]).mul_(coefficient)
        return merged

    return MixedWeights(layout=engine.layout, sources=(base, *experts.values()), mix=mix)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a merge stands on held-out prompts.

    Attributes:
        kept: capability → retention R̂_f, the fraction of the gap from base to expert.
        lost: retain set → how far below the base its replies' log-probability is, nats per token.
        errors: retain set → the standard error of that over its questions.
    """

    kept: Mapping[str, float]
    lost: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    def arrays(self) -> dict[str, Tensor]:
        """All of it as named tensors, to the bit."""
        named = {f"kept/{name}": value for name, value in self.kept.items()}
        named |= {f"lost/{name}": value for name, value in self.lost.items()}
        named |= {f"error/{name}": value for name, value in self.errors.items()}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in named.items()}

    @staticmethod
    def of(arrays: Mapping[str, Tensor], order: Collection[str]) -> "Standing":
        """What :meth:`arrays` gave, capabilities and retain sets in this order: sums run over them."""
        kept = {name: float(arrays[f"kept/{name}"]) for name in order if f"kept/{name}" in arrays}
        lost = {name: float(arrays[f"lost/{name}"]) for name in order if f"lost/{name}" in arrays}
        errors = {name: float(arrays[f"error/{name}"]) for name in lost}
        return Standing(kept=kept, lost=lost, errors=errors)

    @property
    def most(self) -> dict[str, float]:
        """What each retain set may have lost: what its questions have, and a standard error.

        They stand for other questions, and few say little of them.
        """
        return {name: value + self.errors.get(name, 0.0) for name, value in self.lost.items()}

    def excess(self, tolerance: float = TOLERANCE) -> float:
        """What the retain sets may have lost beyond the tolerance, in tolerances."""
        return sum(max(0.0, value / tolerance - 1.0) for value in self.most.values())

    def worth(self, tolerance: float = TOLERANCE, weights: Mapping[str, float] | None = None) -> float:
        """The utility, less :data:`PENALTY` for each tolerance that a retain set may have lost beyond the first."""
        return utility(self.kept, weights) - PENALTY * self.excess(tolerance)


def assess(engine: Engine, merged: WeightSource, readings: Mapping[str, HeldOutReading]) -> Standing:
    """Read every capability and retain set in one run, so that a merge is mixed once."""
    last = max(reading.readout.layer for reading in readings.values())
    assert all(reading.readout.layer == last for reading in readings.values()), "readings of one layer run together"
    rows = [row for reading in readings.values() for row in reading.rows]
    owners = [name for name, reading in readings.items() for _ in reading.rows]
    items: dict[str, Tensor] = {}
    for group in run_together(engine, rows):
        states = final_states(engine, merged, group, last)
        outer = merged.outer(engine.layout.output_tensors())
        own, owners = owners[: len(group)], owners[len(group) :]
        for name in dict.fromkeys(own):
            span = slice(own.index(name), own.index(name) + own.count(name))
            found = read_states(engine, outer, group[span], readings[name].readout, states[span])[0]
            items[name] = items[name] + found if name in items else found
        del outer, states  # before the next group's are made
    kept, lost, errors = {}, {}, {}
    for name, reading in readings.items():
        value = float(items[name].double().mean())
        if reading.retain:
            lost[name] = reading.base - value
            errors[name] = _standard_error(items[name].double().cpu() - reading.base_items)
        else:
            kept[name] = (value - reading.base) / (reading.expert - reading.base)
    return Standing(kept=kept, lost=lost, errors=errors)


def _standard_error(values: Float[Tensor, " items"]) -> float:
    """Of their mean; 0 for one alone, which says nothing of it."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def retention(engine: Engine, merged: WeightSource, readings: Mapping[str, HeldOutReading]) -> dict[str, float]:
    """Per capability, the fraction of the gap from base to expert that a merge keeps."""
    return dict(assess(engine, merged, readings).kept)


def utility(kept: Mapping[str, float], weights: Mapping[str, float] | None = None) -> float:
    """Σ_f w_f log(ε + min(1, R̂_f)), every w_f 1 unless given; a capability below the base counts as none."""
    return sum(
        (1.0 if weights is None else weights[name]) * math.log(EPSILON + bounded(value)) for name, value in kept.items()
    )


def bounded(retention: float) -> float:
    """A retention within [0, 1]: below the base counts as the base, beyond the expert as the expert."""
    return min(1.0, max(0.0, retention))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunable:
    """Numbers that a search moves together.

    Attributes:
        names: which.
        low: least value.
        high: greatest value.
        grid: values tried first, for all of them alike.
        steps: then moves up and down, one size after another; empty for none.
        factor: steps multiply by 1 + step instead of adding it.
    """

    names: tuple[str, ...]
    low: float = 0.0
    high: float
    grid: tuple[float, ...] = ()
    steps: tuple[float, ...] = STEPS
    factor: bool = False

    def moved(self, point: Mapping[str, float], step: float) -> dict[str, float]:
        """The point with these numbers moved by a signed step, within their range."""
        up = {name: point[name] * (1 + abs(step)) ** math.copysign(1, step) for name in self.names}
        moved = up if self.factor else {name: point[name] + step for name in self.names}
        return dict(point) | {name: round(min(self.high, max(self.low, each)), 6) for name, each in moved.items()}


def search_numbers(
    start: Mapping[str, float],
    tunables: Sequence[Tunable],
    evaluate: Callable[[dict[str, float]], _T],
    worth: Callable[[_T], float],
    *,
    evaluations: int,
) -> tuple[dict[str, float], _T]:
    """Coordinate search: each tunable's grid in turn, then each one up and down with shrinking steps.

    Args:
        start: name → value; evaluated only if no tunable has a grid.
        tunables: what may be moved, the most important first.
        evaluate: numbers → what they lead to; called once for each point.
        worth: what that is worth; the largest wins, the first of equals.
        evaluations: how many times ``evaluate`` may be called, at least 1.

    Returns:
        The best point seen, and what it led to.

    Raises:
        RecipeError: no evaluation is allowed.
    """
    if evaluations < 1:
        raise RecipeError("choosing scales takes at least one evaluation", got=evaluations, mend="or give the scales")
    seen: dict[tuple[tuple[str, float], ...], _T] = {}

    def value(point: dict[str, float]) -> float:
        key = tuple(sorted(point.items()))
        if key not in seen:
            if len(seen) >= evaluations:
                return -math.inf
            seen[key] = evaluate(dict(point))
        return worth(seen[key])

    best = dict(start)
    for tunable in tunables:
        if tunable.grid:
            grid = sorted({min(each, tunable.high) for each in tunable.grid})
            tried = [best | dict.fromkeys(tunable.names, each) for each in grid]
            best = max([best, *tried] if seen else tried, key=value)
    if not seen:
        value(best)
    for size in range(max((len(tunable.steps) for tunable in tunables), default=0)):
        movable = [tunable for tunable in tunables if size < len(tunable.steps)]
        improved = True
        while improved and len(seen) < evaluations:
            improved = False
            for tunable in movable:
                for sign in (1, -1):
                    moved = tunable.moved(best, sign * tunable.steps[size])
                    if value(moved) > value(best):
                        best, improved = moved, True
                        break
    return best, seen[tuple(sorted(best.items()))]


def scale_tunables(experts: Sequence[str], *, together: bool, highest: float) -> list[Tunable]:
    """A grid of common scales, then steps of all together or of one expert at a time."""
    if together or len(experts) == 1:
        return [Tunable(names=tuple(experts), high=highest, grid=GRID)]
    common = Tunable(names=tuple(experts), high=highest, grid=GRID, steps=())
    return [common, *(Tunable(names=(name,), high=highest) for name in experts)]
