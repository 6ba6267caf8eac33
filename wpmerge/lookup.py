"""What a report says of a single unit: its score in every map, its ranks, its coefficient and why. Pure functions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from wpmerge.arch import LAYER_KINDS, MODEL_KINDS, Kind, Unit
from wpmerge.cells import cell_width, known_exactly, largest_error, rank_by_size, rounded, units_shown
from wpmerge.errors import WpmergeError
from wpmerge.explaining import explain_many
from wpmerge.figures_evidence import role_members
from wpmerge.page_data import packed_columns, packed_numbers
from wpmerge.replaying import outcome_of_plan, unit_coefficients
from wpmerge.report_inputs import Material
from wpmerge.scores import Scores, array_key

SENTENCES = 1_500_000
"""Characters of sentences behind coefficients that a report holds at most."""
EVERY = 3_000_000
"""Scores, units times maps, above which a report that holds every unit would be too large whatever they are."""


def lookup(
    material: Material, kinds: Sequence[Kind], drawn: Mapping[str, Sequence[Mapping[str, Any]]], *, every: bool
) -> dict[str, Any]:
    """A JSON value for the page's script.

    Args:
        material: the artifacts.
        kinds: those that are shown.
        drawn: the rows of every map, by figure.
        every: hold every unit; otherwise of a kind with many those of :func:`~wpmerge.cells.units_shown`.

    Returns:
        ``maps``: what each column of ``values`` is, and of ``ranks``, which only experts on their own capability have,
        both packed (:mod:`~wpmerge.page_data`); ``units``: ids, a row each; ``names`` of those whose id says little;
        ``kinds``: layers, units, and units a cell; ``exact`` and ``errors`` by label; ``coefficients`` by expert;
        ``why``: unit → sentences; ``roles``: capability → unit → role.
    """
    scores = material.scores
    maps = [
        {
            "label": label,
            "expert": expert,
            "own": record.capability == expert,
            "readout": record.readout,
            "unit": "nats per token" if record.gap is None else "of the gap",
        }
        for label, record in scores.readouts.items()
        for expert in scores.experts
        if any(array_key("linear", label, expert, kind) in scores.arrays for kind in kinds)
    ]
    found: dict[str, Any] = {"maps": maps, "units": [], "values": [], "ranks": [], "names": {}, "kinds": []}
    found["coefficients"] = {} if material.plan is None else {name: [] for name in material.plan.experts}
    for kind in kinds:
        _add_kind(found, material, kind, units_shown(scores, kind, drawn, maps=len(maps), every=every))
    found["values"] = packed_numbers(np.concatenate(found["values"]))
    found["ranks"] = packed_columns(np.concatenate(found["ranks"]).astype(">u4"))
    found["exact"] = {
        label: {
            unit: [rounded(each.screen), rounded(each.exact), rounded(each.stderr), each.drawn]
            for kind in kinds
            for unit, each in known_exactly(record, kind).items()
        }
        for label, record in scores.readouts.items()
    }
    found["errors"] = {
        label: {kind: rounded(error) for kind in kinds if (error := largest_error(record, kind)) is not None}
        for label, record in scores.readouts.items()
    }
    found["roles"] = role_members(material.proof)
    found["why"] = _sentences(material, found["units"])
    return found


def numbers(scores: Scores, kinds: Sequence[Kind]) -> int:
    """How many scores there are of these kinds."""
    return sum(
        a.numel() for key, a in scores.arrays.items() if key.startswith("linear/") and key.split("/")[-1] in kinds
    )


def _add_kind(found: dict[str, Any], material: Material, kind: Kind, places: Sequence[tuple[int, int]]) -> None:
    scores = material.scores
    arrays = [scores.arrays.get(array_key("linear", each["label"], each["expert"], kind)) for each in found["maps"]]
    ranks = [
        rank_by_size(array) if each["own"] and array is not None else None
        for each, array in zip(found["maps"], arrays, strict=True)
    ]
    shape = next(array.shape for array in arrays if array is not None)
    width = cell_width(scores, kind)
    whole = len(places) == shape[0] * shape[1]
    found["kinds"].append({"kind": kind, "layers": shape[0], "units": shape[1], "cell": width, "whole": whole})
    layers, indices = (list(each) for each in zip(*places, strict=True))
    found["values"].append(_columns(arrays, layers, indices, np.nan))
    found["ranks"].append(_columns(ranks, layers, indices, 0))
    names = [str(Unit(kind=kind, layer=layer, index=index)) for layer, index in places]
    found["units"] += names
    if kind in scores.labels and kind not in MODEL_KINDS:
        found["names"] |= {name: scores.labels[kind][index] for name, index in zip(names, indices, strict=True)}
    if material.plan is None:
        return
    for expert in material.plan.experts:
        read = unit_coefficients(material.plan, scores, expert, kind)
        held = [None] * len(places) if read is None else [rounded(each) for each in read[layers, indices].tolist()]
        found["coefficients"][expert] += held


def _columns(
    arrays: Sequence[torch.Tensor | None], layers: Sequence[int], indices: Sequence[int], absent: float
) -> NDArray[np.float64]:
    """[units, maps]: the numbers at these places, where there are any."""
    empty = np.full(len(layers), absent)
    return np.stack([empty if a is None else a[layers, indices].double().numpy() for a in arrays], axis=1)


def explained(material: Material, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Why the plan's coefficients of some units or groups are what they are, a sentence an expert.

    Raises:
        WpmergeError: there is no plan, or no grounds of it; or no such unit or group.
    """
    outcome = None
    if material.plan is not None and material.layout is not None:
        outcome = outcome_of_plan(material.plan, material.scores, material.layout)
    if outcome is None or material.layout is None:
        raise WpmergeError(
            "there is nothing to explain coefficients by",
            where=material.paths.get("plan"),
            got="no plan" if material.plan is None else "no base to look units up in, or a plan that no rule made",
            expected="a plan of wpmerge fuse, and the base where it was scored",
        )
    return explain_many(outcome, material.layout, names)


def _sentences(material: Material, units: Sequence[str]) -> dict[str, list[str]]:
    """Unit → why its coefficients are what they are; the strongest units of a kind first, while there is room."""
    if material.plan is None or material.layout is None:
        return {}
    outcome = outcome_of_plan(material.plan, material.scores, material.layout)
    if outcome is None:
        return {}
    known = {str(unit) for kind in material.layout.counts for unit in material.layout.units(kind)}
    wanted = sorted((unit for unit in units if unit in known), key=lambda unit: _order(material.scores, unit))
    found: dict[str, list[str]] = {}
    room = SENTENCES
    for start in range(0, len(wanted), 500):
        for name, sentences in explain_many(outcome, material.layout, wanted[start : start + 500]).items():
            found[name] = list(sentences)
            room -= sum(map(len, sentences))
        if room <= 0:
            break
    return found


def _order(scores: Scores, unit: str) -> tuple[bool, float]:
    """Units of small kinds first, then by the size of their largest own score."""
    kind, layer, index = (*unit.split("."), "0", "0")[:3]
    sizes = [
        float(array[int(layer), int(index)].abs().nan_to_num())
        for name in scores.experts
        if (array := _own(scores, name, kind)) is not None
    ]
    return (kind == "neuron" and kind in LAYER_KINDS, -max(sizes, default=0.0))


def _own(scores: Scores, name: str, kind: str) -> Float[Tensor, "layers units"] | None:
    found: torch.Tensor | None = scores.arrays.get(array_key("linear", name, name, kind))
    return found
