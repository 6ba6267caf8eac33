"""Activation patching to first order, against putting the expert's outputs into the base's run for real."""

import pytest
import torch
from tiny import CONFIGS, ModelWeights, tiny_model

from wpmerge.activation import activation_effects
from wpmerge.attribution import linear
from wpmerge.engine import Engine
from wpmerge.readouts import LogProbReadout
from wpmerge.rows import pack

SEQUENCES = [[5, 9, 31, 7, 8], [40, 41, 42, 6, 12, 13]]


def family(kind, step):
    base = ModelWeights.of(tiny_model(kind, seed=0))
    generator = torch.Generator().manual_seed(1)
    moved = {name: t + step * torch.randn(t.shape, generator=generator) for name, t in base.tensors.items()}
    return base, ModelWeights(base.layout, moved)


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"olmo2"}))  # where a norm spans heads, a head changes all
def test_in_the_first_layer_it_is_weight_patching_where_the_inputs_are_the_same(kind):
    """With one embedding for both, layer 0's neurons and heads differ by their weights alone, once norms and keys are
    shared: the activation's effect there is the weights' own."""
    base, expert = family(kind, 0.02)
    layout = base.layout
    for name in expert.tensors:
        units = layout.tensors.get(name)
        own = units is not None and {s.kind for s in units.segments} == {"head"} and "norm" not in name
        if not (own and name.startswith(layout.layer_prefix(0))):
            expert.tensors[name] = base.tensors[name]
    engine = Engine(layout)
    readout = LogProbReadout(layer=layout.layers - 1, sequences=SEQUENCES, starts=[3, 3])
    rows = pack(SEQUENCES)
    (weights,) = linear(engine, base, [expert], rows, readout, kinds=("head",))
    found = activation_effects(engine, base, expert, rows, readout)
    torch.testing.assert_close(found["head"][0], weights["head"][0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_the_expert_against_itself_does_nothing(kind):
    base, _ = family(kind, 0.02)
    readout = LogProbReadout(layer=base.layout.layers - 1, sequences=SEQUENCES, starts=[3, 3])
    found = activation_effects(Engine(base.layout), base, base, pack(SEQUENCES), readout)
    assert all(float(each.abs().max()) == 0.0 for each in found.values())
