"""What the planted benchmark rests on: its masks, its plants, and its two measures of a ranking."""

import pytest
import torch
from tiny import ModelWeights, tiny_model

from benchmarks.planted.run import LENGTH, SKILL, auroc, average_precision, draw_plant, masks, sequences, summary


def test_measures_by_hand():
    """Of 5 units, 0 and 3 are planted. Pairs planted above another: 3 + 2 of 6; precision at each: 1/1, 2/3."""
    positive = torch.tensor([True, False, False, True, False])
    values = torch.tensor([9.0, 5.0, 1.0, 3.0, 2.0])
    assert auroc(values, positive) == pytest.approx(5 / 6)
    assert average_precision(values, positive) == pytest.approx((1 + 2 / 3) / 2)
    assert auroc(torch.zeros(5), positive) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["concentrated", "spread", "redundant"])
def test_a_mask_covers_a_plant_and_nothing_else(kind):
    layout = ModelWeights.of(tiny_model("llama", seed=0, num_hidden_layers=4, intermediate_size=64)).layout
    sets = draw_plant(layout, kind, torch.Generator().manual_seed(3))
    again = draw_plant(layout, kind, torch.Generator().manual_seed(3))
    assert sets == again and len(sets) == (2 if kind == "redundant" else 1)
    units = [unit for each in sets for unit in each]
    assert len(set(units)) == len(units)
    found = masks(layout, units)
    assert sum(float(each.sum()) for each in found.values()) == sum(layout.parameters(unit) for unit in units)


def test_a_sequence_moves_its_words_on():
    made = sequences(SKILL, 3, 4, torch.Generator().manual_seed(0))
    assert made.shape == (4, 2 * LENGTH + 1) and (made[:, LENGTH] == SKILL).all()
    assert torch.equal(made[:, LENGTH + 1 :], (made[:, :LENGTH] + 3) % 32)


def test_only_accepted_plants_count():
    mine = {"linear, sufficiency": 0.9, "integrated, sufficiency": 0.8, "exact, sufficiency": 0.7}
    plant = {"plant": "spread", "auroc": dict(mine), "ap": dict(mine)}
    for name in ("activation", "norm", "norm per weight", "magnitude", "fisher", "depth", "random"):
        plant["auroc"][name] = plant["ap"][name] = 0.4
    found = summary([plant | {"accepted": True}, plant | {"accepted": False}])["spread"]
    assert (found["made"], found["accepted"]) == (2, 1)
    assert found["auroc"]["linear, sufficiency"] == [0.9, 0.9, 0.9]
    assert found["auroc, linear ahead of"]["norm"] == [0.5, 0.5, 0.5]
    assert found["ap, exact ahead of"]["depth"] == [0.3, 0.3, 0.3]
