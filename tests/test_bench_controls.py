"""Controls keep what they are said to keep, and lose the rest."""

import pytest
import torch
from checkpoints import family

from wpmerge.bench_controls import same_norm, shuffled
from wpmerge.bench_mergekit import MergekitInMemory
from wpmerge.checkpoint import open_checkpoint
from wpmerge.coefficients import make_grouping, tensor_coefficients
from wpmerge.models import layout_of
from wpmerge.plan import Coefficient
from wpmerge.weights import CheckpointWeights


@pytest.fixture(scope="module")
def merger(tmp_path_factory):
    made = family(tmp_path_factory.mktemp("controls"))
    base = open_checkpoint(made["base"])
    layout = layout_of(base)
    sources = {
        name: CheckpointWeights(layout, open_checkpoint(path), device=torch.device("cpu"))
        for name, path in made.items()
    }
    return MergekitInMemory(layout, sources.pop("base"), sources)


@pytest.fixture(scope="module")
def by_unit(merger):
    """A different coefficient for every unit."""
    grouping = make_grouping(merger.layout, "unit")
    count = len(grouping.names)
    values = {"e0": torch.linspace(0.0, 1.0, count), "e1": torch.linspace(1.0, 2.0, count)}
    return {name: tensor_coefficients(merger.layout, grouping, value.double()) for name, value in values.items()}


def test_units_change_places_within_layer_and_kind(merger, by_unit):
    dealt = shuffled(merger.layout, by_unit, seed=3)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp."
        before = by_unit["e0"][prefix + "up_proj.weight"].values
        after = dealt["e0"][prefix + "up_proj.weight"].values
        assert not torch.equal(before, after)
        assert torch.equal(before.sort().values, after.sort().values)
        for tensor in ("gate_proj", "down_proj"):  # a neuron's rows and column move together
            assert torch.equal(dealt["e0"][f"{prefix}{tensor}.weight"].values, after)
        queries = dealt["e0"][f"model.layers.{layer}.self_attn.q_proj.weight"].values.view(4, 4)
        assert torch.equal(queries, queries[:, :1].expand(4, 4))  # a head's rows stay together
        norm = f"model.layers.{layer}.input_layernorm.weight"
        assert dealt["e0"][norm] is by_unit["e0"][norm]
    name = "model.layers.0.mlp.up_proj.weight"
    again, other = shuffled(merger.layout, by_unit, seed=3), shuffled(merger.layout, by_unit, seed=4)
    assert torch.equal(again["e0"][name].values, dealt["e0"][name].values)
    assert not torch.equal(other["e0"][name].values, dealt["e0"][name].values)


def test_single_numbers_change_places_between_layers(merger):
    stored = list(merger.layout.stored.values())
    flat = {name: Coefficient(values=torch.tensor(float(i))) for i, name in enumerate(stored)}
    seen = set()
    for seed in range(8):
        dealt = shuffled(merger.layout, {"e0": flat}, seed=seed)["e0"]
        first = float(dealt["model.layers.0.mlp.up_proj.weight"].values)
        seen.add(first)
        expected = {float(flat[f"model.layers.{i}.mlp.up_proj.weight"].values) for i in range(2)}
        assert {float(dealt[f"model.layers.{i}.mlp.up_proj.weight"].values) for i in range(2)} == expected
        assert dealt["model.norm.weight"] is flat["model.norm.weight"]
    assert len(seen) == 2


def test_the_plain_merge_is_as_long_as_the_rules(merger, by_unit):
    plain = same_norm(merger.layout, by_unit, merger.deltas)
    lengths = []
    for coefficients in (by_unit, plain):
        merged = merger.with_coefficients(coefficients)
        squares = [(merged.tensors[n] - merger.base[n]).double().square().sum() for n in merger.base]
        lengths.append(float(torch.stack(squares).sum().sqrt()))
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-5)
    assert len({float(c.values) for each in plain.values() for c in each.values()}) == 1
