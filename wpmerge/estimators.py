"""The estimators behind one interface: how a unit's effect on a readout is found (docs/method.md, "Estimators").

``linear`` scores every unit from one backward run, ``integrated`` gives additive shares of the gap, ``exact`` replaces
every unit for real. All take any unit kinds, finest or coarse, and any readout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch

from wpmerge.arch import KINDS, MODEL_KINDS, Kind
from wpmerge.attribution import UnitArrays, empty_arrays, linear
from wpmerge.engine import Engine
from wpmerge.gradients import integrated
from wpmerge.memory import HELD_BYTES, held_per_token
from wpmerge.patching import HELD_BYTES as EXACT_HELD_BYTES
from wpmerge.patching import exact
from wpmerge.pieces import Keeper
from wpmerge.readouts import Readout
from wpmerge.rows import Row, row_groups
from wpmerge.weights import WeightSource

EstimatorName = Literal["linear", "integrated", "exact"]
ESTIMATORS: tuple[EstimatorName, ...] = ("linear", "integrated", "exact")


@runtime_checkable
class Keeping(Keeper, Protocol):
    """A keeper that parts of the work can have their own part of."""

    def below(self, name: str) -> "Keeping":
        """The part of that name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorSettings:
    """What an estimator may be told.

    Attributes:
        kinds: unit kinds to score; those that the model lacks are left out.
        points: Gauss–Legendre nodes of ``integrated``.
        held_bytes: bound on residual streams and block inputs held at a time, bytes.
    """

    kinds: Sequence[Kind] = KINDS
    points: int = 4
    held_bytes: int = HELD_BYTES


def estimate(
    name: EstimatorName,
    engine: Engine,
    base: WeightSource,
    experts: Sequence[WeightSource],
    rows: Sequence[Row],
    readout: Readout,
    settings: EstimatorSettings,
    *,
    keeper: Keeping | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[UnitArrays]:
    """Effects, or shares, of every unit of each expert on a readout of the base.

    Args:
        name: which estimator.
        engine: runs the layers.
        base: the model that is patched.
        experts: where units come from.
        rows: the readout's prompts.
        readout: F.
        settings: see :class:`EstimatorSettings`.
        keeper: keeps finished pieces.
        progress: called with units done and in all.

    Returns:
        For each expert raw effects, in the readout's own unit; NaN for units that the readout cannot see.
    """
    groups = list(row_groups(rows, settings.held_bytes // held_per_token(engine.layout, readout.layer)))
    units = _count(engine, name, readout, settings) * len(experts) * len(groups)
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, units), units)

    total: list[UnitArrays] = []
    for number, group in enumerate(groups):
        part = None if keeper is None else keeper.below(str(number))
        if name == "linear":
            found = linear(engine, base, experts, group, readout, kinds=settings.kinds, keeper=part, progress=tell)
        elif name == "integrated":
            found = integrated(
                engine,
                base,
                experts,
                group,
                readout,
                kinds=settings.kinds,
                points=settings.points,
                keeper=part,
                progress=tell,
            )
        else:
            found = _every_unit(engine, base, experts, group, readout, settings, part, tell)
        total = [_added(*pair) for pair in zip(total, found, strict=True)] if total else found
    return total


def _count(engine: Engine, name: EstimatorName, readout: Readout, settings: EstimatorSettings) -> int:
    """Units whose progress is told, for one expert and group of rows."""
    layout = engine.layout
    shapes = {kind: tuple(array.shape) for kind, array in empty_arrays(layout, settings.kinds).items()}
    if name == "linear":  # told layer by layer, up to the readout's
        return sum(units * (readout.layer + 1) for kind, (_, units) in shapes.items() if kind not in MODEL_KINDS)
    return sum(layers * units for layers, units in shapes.values()) * (settings.points if name == "integrated" else 1)


def _every_unit(
    engine: Engine,
    base: WeightSource,
    experts: Sequence[WeightSource],
    rows: Sequence[Row],
    readout: Readout,
    settings: EstimatorSettings,
    keeper: Keeping | None,
    tell: Callable[[int], None],
) -> list[UnitArrays]:
    """Exact patching of all units, as arrays."""
    found = []
    for number, expert in enumerate(experts):
        arrays = empty_arrays(engine.layout, settings.kinds)
        units = [unit for kind in arrays for unit in engine.layout.units(kind)]
        effects = exact(
            engine,
            base,
            expert,
            rows,
            readout,
            units,
            held_bytes=min(settings.held_bytes, EXACT_HELD_BYTES),
            keeper=None if keeper is None else keeper.below(str(number)),
            progress=tell,
        )
        for unit, effect in zip(units, effects.mean(dim=1), strict=True):
            arrays[unit.kind][unit.layer, unit.index] = effect
        found.append(arrays)
    return found


def _added(one: UnitArrays, other: UnitArrays) -> UnitArrays:
    return {kind: one[kind] + other[kind] for kind in one}


def completeness(shares: UnitArrays) -> float:
    """The sum of all shares, units without one left out."""
    return float(torch.stack([array.double().nansum() for array in shares.values()]).sum())
