"""Cells of maps by hand: which unit stands for its neighbours, and how sure its number is."""

import math

import pytest
import torch
from reports import made_scores

from wpmerge.cells import (
    bin_width,
    cell_width,
    cells,
    certainty,
    kinds_of,
    panels,
    rank_by_size,
    rounded,
    strongest,
    units_shown,
)
from wpmerge.scores import Verified

NAN = math.nan


def test_the_strongest_of_a_bin_is_by_size_and_unseen_units_lose():
    values = torch.tensor([[0.1, -0.5, 0.3, NAN, 0.2], [NAN, NAN, NAN, 0.1, -0.4]])
    assert strongest(values, 2).tolist() == [[1, 2, 4], [0, 3, 4]]
    assert strongest(values, 1).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert strongest(values, 5).tolist() == [[1], [4]]


def test_ranks_are_by_size_and_0_where_there_is_no_score():
    assert rank_by_size(torch.tensor([[0.1, -0.5], [NAN, 0.3]])).tolist() == [[3, 1], [0, 2]]


@pytest.mark.parametrize(
    ("units", "layers", "maps", "width"),
    [(9, 30, 9, 1), (4, 4, 9, 1), (1536, 30, 9, 48), (14336, 32, 16, 531), (64, 80, 4, 2)],
)
def test_units_share_cells_where_there_are_too_many(units, layers, maps, width):
    assert bin_width(units, layers, maps) == width
    assert layers * maps * -(-units // width) <= 15_000


def test_how_a_number_is_known():
    unit = Verified(unit="head.0.0", drawn="top", screen=0.2, exact=0.25, stderr=0.01)
    assert certainty(0.2, unit, 0.5) == ("verified", 0.25, pytest.approx(0.2304), pytest.approx(0.2696))
    assert certainty(0.2, None, 0.05) == ("estimated", None, pytest.approx(0.15), pytest.approx(0.25))
    assert certainty(0.2, None, None) == ("estimated", None, None, None)
    assert certainty(NAN, None, 0.05) == ("not seen by this readout", None, None, None)
    assert (rounded(NAN), rounded(None), rounded(0.123456)) == (None, None, 0.1235)


def test_cells_of_maps():
    scores = made_scores()
    maps = panels(scores, "reference", "head")
    assert [(each.expert, each.label, each.own) for each in maps] == [
        ("a", "a", True), ("a", "b", False), ("b", "a", False), ("b", "b", True)
    ]  # fmt: skip
    found = cells(scores, "head", maps)
    assert len(found) == 4 * 16
    own = {(each["expert"], each["read"], each["unit"]): each for each in found}
    assert own["a", "a", "head.0.1"]["exact"] == 0.11 and own["a", "a", "head.0.1"]["sure"] == "verified"
    assert own["b", "a", "head.0.1"]["exact"] is None and own["b", "a", "head.0.1"]["sure"] == "estimated"
    cell = own["b", "a", "head.2.3"]
    assert cell["value"] == rounded(float(scores.arrays["linear/a/b/head"][2, 3]))
    assert (cell["low"], cell["high"]) == (None, None), "another expert's units were not verified on this readout"
    cell = own["a", "a", "head.2.3"]
    assert cell["high"] - cell["low"] == pytest.approx(0.06, abs=1e-4)
    marked = [each for each in found if each["expert"] == each["read"] == "a" and each["mark"]]
    assert len(marked) == 5 and all((each["mark"] == "▲") is (each["value"] > 0) for each in marked)
    assert {each.label for each in panels(scores, "reference", "head", retain=True)} == {"plain"}


def test_what_is_not_seen_is_never_0():
    scores = made_scores()
    found = cells(scores, "head", panels(scores, "anchor", "head"))
    above = [each for each in found if each["layer"] >= 2]
    assert above and all(each["value"] is None and each["sure"] == "not seen by this readout" for each in above)


def test_many_neurons_are_looked_up_by_their_cells():
    scores = made_scores(layers=30, heads=9, neurons=512, names=("a",))
    assert kinds_of(scores) == ["head", "neuron", "norm", "embedding"]
    width = cell_width(scores, "neuron")
    assert width == 16
    drawn = {"map": cells(scores, "neuron", panels(scores, "reference", "neuron"))}
    shown = units_shown(scores, "neuron", drawn, maps=3)
    assert len(shown) == 30 * 32 < 30 * 512
    assert len(units_shown(scores, "neuron", drawn, maps=3, every=True)) == 30 * 512
    assert len(units_shown(scores, "head", {}, maps=3)) == 270
    assert units_shown(scores, "embedding", {}, maps=3) == [(0, 0)]
    few = units_shown(scores, "neuron", drawn, maps=1_000)
    sizes = {cell["unit"]: abs(cell["value"]) for cell in drawn["map"]}
    largest = sorted(sizes, key=lambda unit: -sizes[unit])[:180]
    assert {f"neuron.{layer}.{index}" for layer, index in few} == set(largest)
