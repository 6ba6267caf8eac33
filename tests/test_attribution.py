"""Linear weight patching: against the derivative, against exact patching, and between its own paths."""

import pytest
import torch
from test_patching import SEQUENCES, make_readouts
from tiny import CONFIGS, ModelWeights, tiny_model

from wpmerge.arch import COARSE_KINDS, KINDS, Unit
from wpmerge.attribution import linear
from wpmerge.engine import Engine
from wpmerge.gradients import directional
from wpmerge.patching import exact
from wpmerge.rows import pack
from wpmerge.weights import MixedWeights

KINDS_ALL = (*KINDS, *COARSE_KINDS)


def nearby(base: ModelWeights, far: ModelWeights, step: float) -> ModelWeights:
    tensors = {name: value + step * (far.tensors[name] - value) for name, value in base.tensors.items()}
    return ModelWeights(base.layout, tensors)


@pytest.mark.parametrize("reading", ["anchor", "reference"])
@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_linear_is_exact_where_the_patch_is_small(model_type: str, reading: str) -> None:
    base, far = (ModelWeights.of(tiny_model(model_type, seed=seed, dtype=torch.float64)) for seed in (0, 3))
    expert = nearby(base, far, 1e-4)
    engine, layout = Engine(base.layout, dtype=torch.float64), base.layout
    readout, rows = make_readouts(layout, torch.float64)[reading], pack(SEQUENCES, tokens_per_row=16)
    (estimate,) = linear(engine, base, [expert], rows, readout, kinds=KINDS_ALL)
    largest = max(float(array.abs().nan_to_num().max()) for array in estimate.values())
    for kind, array in estimate.items():
        units = list(layout.units(kind))
        truth = exact(engine, base, expert, rows, readout, units).mean(dim=1).view(array.shape)
        assert torch.equal(array.isnan(), truth.isnan()), kind
        # two per cent of the kind's largest, and what transformers' float32 norms round away at this step
        tolerance = 0.02 * float(truth.abs().nan_to_num().max()) + 1e-3 * largest
        torch.testing.assert_close(array, truth, rtol=0, atol=tolerance, equal_nan=True, msg=kind)


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_linear_is_the_derivative_along_the_patch(model_type: str) -> None:
    """As Δ → 0 the estimate over Δ tends to ⟨∇_u F, Δ_u⟩, here from autograd over the weights themselves."""
    base, far = (ModelWeights.of(tiny_model(model_type, seed=seed, dtype=torch.float64)) for seed in (0, 3))
    engine, layout = Engine(base.layout, dtype=torch.float64), base.layout
    step = 1e-4
    for readout in make_readouts(layout, torch.float64).values():
        rows = pack(SEQUENCES)
        (estimate,) = linear(engine, base, [nearby(base, far, step)], rows, readout)
        (slope,) = directional(engine, base, base, [far], rows, readout)
        for kind, array in estimate.items():
            # transformers' norms compute in float32, so a smaller step would show their rounding
            scale = float(slope[kind].abs().nan_to_num().max())
            torch.testing.assert_close(
                array / step, slope[kind], rtol=0, atol=0.03 * scale + 1e-9, equal_nan=True, msg=kind
            )


def test_the_last_units_have_exact_estimates() -> None:
    """What stands right before a linear readout is not approximated at all: the last MLP's neurons under an anchor."""
    base, expert = (ModelWeights.of(tiny_model("gpt2", seed=seed, dtype=torch.float64)) for seed in (0, 3))
    engine, layout = Engine(base.layout, dtype=torch.float64), base.layout
    readout, rows = make_readouts(layout, torch.float64)["anchor"], pack(SEQUENCES)
    (estimate,) = linear(engine, base, [expert], rows, readout)
    units = [Unit(kind="neuron", layer=readout.layer, index=i) for i in range(layout.counts["neuron"])]
    truth = exact(engine, base, expert, rows, readout, units).mean(dim=1)
    torch.testing.assert_close(estimate["neuron"][readout.layer], truth, rtol=1e-9, atol=1e-12)


def test_experts_are_scored_as_if_alone() -> None:
    base, one, two = (ModelWeights.of(tiny_model("llama", seed=seed)) for seed in (0, 1, 2))
    engine = Engine(base.layout)
    readout, rows = make_readouts(base.layout, torch.float32)["reference"], pack(SEQUENCES)
    together = linear(engine, base, [one, two], rows, readout)
    for expert, arrays in zip((one, two), together, strict=True):
        (alone,) = linear(engine, base, [expert], rows, readout)
        for kind, array in arrays.items():
            assert torch.equal(array.nan_to_num(7), alone[kind].nan_to_num(7)), kind


def test_mixed_weights_interpolate() -> None:
    base, expert = (ModelWeights.of(tiny_model("llama", seed=seed)) for seed in (0, 1))
    half = MixedWeights(layout=base.layout, sources=(base, expert), mix=lambda _, pair: (pair[0] + pair[1]) / 2)
    assert torch.equal(
        half.layer(1)["mlp.up_proj.weight"],
        (base.layer(1)["mlp.up_proj.weight"] + expert.layer(1)["mlp.up_proj.weight"]) / 2,
    )
