"""Choose the few global numbers of a merge by running it on held-out prompts: seconds, no generation, no benchmark.

Shape suffixes: E experts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from wpmerge.engine import Engine
from wpmerge.errors import RecipeError
from wpmerge.plan import Coefficient
from wpmerge.readouts import Readout, measure
from wpmerge.rows import Row
from wpmerge.weights import MixedWeights, WeightSource

EPSILON = 0.01
"""ε of the utility Σ_f log(ε + min(1, R̂_f)): a lost skill costs much, but not everything."""
GRID = (0.3, 0.5, 0.7, 0.9)
STEPS = (0.2, 0.1, 0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutReading:
    """A capability's readout on held-out prompts, and what base and expert give there.

    Attributes:
        readout: F.
        rows: the held-out prompts.
        base: F(base).
        expert: F(its own expert).
    """

    readout: Readout
    rows: Sequence[Row]
    base: float
    expert: float


def read_held_out(
    engine: Engine, base: WeightSource, expert: WeightSource, readout: Readout, rows: Sequence[Row]
) -> HeldOutReading:
    """Measure base and expert once, so that a merge's retention can be told from its own run alone."""
    values = [float(measure(engine, source, rows, readout).double().mean()) for source in (base, expert)]
    return HeldOutReading(readout=readout, rows=rows, base=values[0], expert=values[1])


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
            merged += coefficient * (tensor - tensors[0])
        return merged

    return MixedWeights(layout=engine.layout, sources=(base, *experts.values()), mix=mix)


def retention(engine: Engine, merged: WeightSource, readings: Mapping[str, HeldOutReading]) -> dict[str, float]:
    """Per capability, the fraction of the gap from base to expert that a merge keeps."""
    found = {}
    for name, reading in readings.items():
        value = float(measure(engine, merged, reading.rows, reading.readout).double().mean())
        found[name] = (value - reading.base) / (reading.expert - reading.base)
    return found


def utility(kept: Mapping[str, float]) -> float:
    """Σ_f log(ε + min(1, R̂_f)); a capability below the base counts as none."""
    return sum(math.log(EPSILON + min(1.0, max(0.0, value))) for value in kept.values())


def search_scales(
    experts: Sequence[str],
    evaluate: Callable[[dict[str, float]], dict[str, float]],
    *,
    evaluations: int,
    together: bool,
    highest: float,
) -> tuple[dict[str, float], dict[str, float]]:
    """The scale per expert with the largest utility: a grid of common scales, then one expert at a time.

    Args:
        experts: their names.
        evaluate: scales → retention per capability.
        evaluations: how many times ``evaluate`` may be called, at least 1.
        together: one scale for all experts.
        highest: largest scale tried.

    Returns:
        The best scales seen, and their retention.

    Raises:
        RecipeError: no evaluation is allowed.
    """
    if evaluations < 1:
        raise RecipeError("choosing scales takes at least one evaluation", got=evaluations, mend="or give the scales")
    seen: dict[tuple[float, ...], dict[str, float]] = {}

    def value(scales: tuple[float, ...]) -> float:
        if scales not in seen:
            if len(seen) >= evaluations:
                return -math.inf
            seen[scales] = evaluate(dict(zip(experts, scales, strict=True)))
        return utility(seen[scales])

    grid = sorted({min(scale, highest) for scale in GRID})
    best = max(((scale,) * len(experts) for scale in grid), key=value)
    moves = [range(len(experts))] if together or len(experts) == 1 else [[i] for i in range(len(experts))]
    for step in STEPS:
        improved = True
        while improved and len(seen) < evaluations:
            improved = False
            for members in moves:
                for sign in (1, -1):
                    moved = tuple(
                        round(min(highest, max(0.0, s + sign * step)), 6) if i in members else s
                        for i, s in enumerate(best)
                    )
                    if value(moved) > value(best):
                        best, improved = moved, True
                        break
    return dict(zip(experts, best, strict=True)), seen[best]
