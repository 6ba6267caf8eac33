"""Scores as the cells of a map: which unit a cell shows, and how sure its number is. Pure functions.

A map has a column per layer and a row per unit. Where that would be more cells than can be seen, neighbouring units
share one, which shows the strongest of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wpmerge.arch import COARSE_KINDS, KINDS, Kind, Unit
from wpmerge.scores import ReadoutRecord, Scores, Verified, array_key

CELLS = 14_000
"""Most cells of all maps of a kind together."""
ROWS = 32
"""Most rows of a map whose units are not all shown."""
FEWEST = 8
"""Rows of a map, however many maps there are."""
MARKED = 5
"""Strongest units of a map that bear a mark, so that nobody needs to tell colours to find them."""
Z95 = 1.96
VERIFIED, ESTIMATED, UNSEEN = "verified", "estimated", "not seen by this readout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One map: the units of an expert, read by one readout. ``own``: it is the expert's own capability."""

    expert: str
    label: str
    own: bool


def panels(scores: Scores, readout: str, kind: Kind, *, retain: bool = False) -> list[Panel]:
    """The maps of a kind that scores are there for, expert by expert.

    Args:
        scores: where they are looked up.
        readout: "reference", "anchor" or "divergence": each label of it is a column of maps.
        kind: of unit.
        retain: of retain sets, which have effects in nats per token, instead of capabilities.
    """
    found = []
    for expert in scores.experts:
        for label, record in scores.readouts.items():
            fits = record.readout == readout and (record.gap is None) is retain
            if fits and array_key("linear", label, expert, kind) in scores.arrays:
                found.append(Panel(expert=expert, label=label, own=record.capability == expert))
    return found


def cell_width(scores: Scores, kind: Kind) -> int:
    """How many neighbouring units of a kind share a cell, the same in all maps of a report."""
    layers, units = next(array.shape for key, array in scores.arrays.items() if key.endswith(f"/{kind}"))
    columns: dict[tuple[str, bool], int] = {}
    for record in scores.readouts.values():
        columns[record.readout, record.gap is None] = columns.get((record.readout, record.gap is None), 0) + 1
    return bin_width(units, layers, len(scores.experts) * max(columns.values(), default=1))


def bin_width(units: int, layers: int, maps: int) -> int:
    """How many neighbouring units share a cell: 1 where every unit has its own."""
    most = max(FEWEST, CELLS // max(1, layers * maps))
    if units <= min(most, 2 * ROWS):
        return 1
    return -(-units // min(most, ROWS))


def strongest(values: Float[Tensor, "layers units"], width: int) -> Int[Tensor, "layers bins"]:
    """The unit of largest size in each bin of ``width`` neighbours; the bin's first where none has a score."""
    layers, units = values.shape
    bins = -(-units // width)
    sizes = values.abs().nan_to_num(nan=-1.0)
    padded = torch.nn.functional.pad(sizes, (0, bins * width - units), value=-2.0)
    return padded.view(layers, bins, width).argmax(dim=2) + width * torch.arange(bins)


def rank_by_size(values: Float[Tensor, "layers units"]) -> Int[Tensor, "layers units"]:
    """1 for the unit of largest size; 0 where there is no score."""
    flat = values.flatten()
    order = flat.abs().nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
    ranks = torch.zeros_like(order)
    ranks[order] = torch.arange(1, len(order) + 1)
    return ranks.masked_fill(flat.isnan(), 0).view(values.shape)


def known_exactly(record: ReadoutRecord, kind: str) -> dict[str, Verified]:
    """Unit → what replacing it for real gave."""
    found = record.verification.get("sufficiency", {}).get(kind)
    return {each.unit: each for each in found.units} if found else {}


def largest_error(record: ReadoutRecord, kind: str) -> float | None:
    """The screen's largest error in the random draw of a kind; None where none was drawn."""
    found = record.verification.get("sufficiency", {}).get(kind)
    return found.largest_error if found else None


def certainty(
    value: float, verified: Verified | None, error: float | None
) -> tuple[str, float | None, float | None, float | None]:
    """How a number is known, the exact value where there is one, and an interval about the best value.

    A verified unit has the 95% interval of its exact recovery over prompts. An estimated one has the estimate ± the
    largest error that the screen made in the random draw of its kind, if any was drawn.
    """
    if verified is not None:
        reach = Z95 * verified.stderr
        return VERIFIED, verified.exact, verified.exact - reach, verified.exact + reach
    if math.isnan(value):
        return UNSEEN, None, None, None
    return ESTIMATED, None, *((None, None) if error is None else (value - error, value + error))


def cells(scores: Scores, kind: Kind, maps: Sequence[Panel]) -> list[dict[str, Any]]:
    """The cells of several maps of one kind.

    Returns:
        Records with ``expert``, ``read``, ``layer``, ``bin``, ``unit`` (the one shown), ``value`` (linear; None where
        the readout cannot see it), ``sure``, ``exact``, ``low``, ``high``, ``mark`` (``▲``, ``▼`` or none).
    """
    found = []
    for panel in maps:
        record, values = scores.readouts[panel.label], scores.array(panel.label, panel.expert, kind)
        width = cell_width(scores, kind)
        # a retain set's units are verified for every expert, under the same names; a capability's for its own
        exact = known_exactly(record, kind) if panel.own else {}
        error = largest_error(record, kind) if panel.own else None
        ranks = rank_by_size(values)
        for layer, row in enumerate(strongest(values, width).tolist()):
            for place, index in enumerate(row):
                unit, value = str(Unit(kind=kind, layer=layer, index=index)), float(values[layer, index])
                sure, better, low, high = certainty(value, exact.get(unit), error)
                top = 0 < int(ranks[layer, index]) <= MARKED and value != 0
                found.append(
                    {
                        "expert": panel.expert,
                        "read": panel.label,
                        "layer": layer,
                        "bin": place,
                        "unit": unit,
                        "value": rounded(value),
                        "sure": sure,
                        "exact": rounded(better),
                        "low": rounded(low),
                        "high": rounded(high),
                        "mark": ("▲" if value > 0 else "▼") if top else None,
                    }
                )
    return found


def rounded(value: float | None, digits: int = 4) -> float | None:
    """A number as short as it may be in a file; None for what is not known."""
    return None if value is None or math.isnan(value) else float(f"{value:.{digits}g}")


def kinds_of(scores: Scores) -> list[Kind]:
    """Kinds of which some expert has a score, the finest first."""
    stored = {key.rsplit("/", 1)[1] for key in scores.arrays}
    return [kind for kind in (*KINDS, *COARSE_KINDS) if kind in stored]


UNITS = 3000
"""Units of a kind up to which all of them can be looked up in any report."""
NUMBERS = 180_000
"""Scores of a kind, units times maps, that a report which cannot hold every unit can be asked about."""


def units_shown(
    scores: Scores, kind: Kind, drawn: Mapping[str, Sequence[Mapping[str, Any]]], *, maps: int, every: bool = False
) -> list[tuple[int, int]]:
    """Layer and index of the units of a kind that a report can be asked about.

    All of them if they are not many, or with ``every``; otherwise the verified ones, and those that a cell shows, an
    expert's on its own capability first and large ones before small ones, as many as there is room for.

    Args:
        scores: where they have scores.
        kind: of unit.
        drawn: the cells of every map that was drawn, by any key.
        maps: how many scores each unit brings with it.
        every: there is room for every unit.
    """
    layers, count = next(array.shape for key, array in scores.arrays.items() if key.endswith(f"/{kind}"))
    most = max(100, NUMBERS // max(1, maps))
    if every or layers * count <= min(UNITS, most):
        return [(layer, index) for layer in range(layers) for index in range(count)]
    order: dict[str, None] = {}
    for record in scores.readouts.values():
        order |= dict.fromkeys(known_exactly(record, kind))
    shown = [cell for cells in drawn.values() for cell in cells if str(cell["unit"]).startswith(f"{kind}.")]
    shown.sort(key=lambda cell: (not _is_own(scores, cell), -abs(cell["value"] or 0.0)))
    order |= dict.fromkeys(str(cell["unit"]) for cell in shown)
    return sorted(_place(name) for name in list(order)[:most])


def _is_own(scores: Scores, cell: Mapping[str, Any]) -> bool:
    return scores.readouts[cell["read"]].capability == str(cell["expert"])


def _place(name: str) -> tuple[int, int]:
    _, layer, index = name.split(".")
    return int(layer), int(index)
