"""Cross-model activation patching: a unit's output, not its weights, comes from the expert's run of the same prompt.

A(u) to first order: what u writes into the residual stream in the expert's own run, minus what it writes in the
base's, contracted with ∂F there in the base's run (arXiv:2604.13694 compares weight with activation patching).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.arch import Kind
from wpmerge.attribution import UnitArrays, empty_arrays
from wpmerge.engine import Engine
from wpmerge.readouts import Readout, output_gradient, trace
from wpmerge.rows import Row
from wpmerge.weights import WeightSource

PATCHED: tuple[Kind, ...] = ("head", "neuron")
"""Kinds that write into the residual stream by themselves."""


@torch.no_grad()
def activation_effects(
    engine: Engine, base: WeightSource, expert: WeightSource, rows: Sequence[Row], readout: Readout
) -> UnitArrays:
    """A(u) for every head and neuron, in the readout's own unit; NaN above the readout's layer.

    Args:
        engine: runs the layers.
        base: whose run is patched.
        expert: in whose run the outputs arise.
        rows: the readout's prompts.
        readout: F.
    """
    effects = empty_arrays(engine.layout, PATCHED)
    run = trace(engine, base, rows, last=readout.layer)
    other = trace(engine, expert, rows, last=readout.layer)
    outer = base.outer(engine.layout.output_tensors())
    gradients = [
        output_gradient(engine, outer, row, readout, hidden[-1]) for row, hidden in zip(rows, run.hidden, strict=True)
    ]
    for index in reversed(range(readout.layer + 1)):
        weights, theirs = base.layer(index), expert.layer(index)
        for kind in PATCHED:
            effects[kind][index] = 0.0
        for number, entry in enumerate(run.entries):
            call = entry.calls[index]
            with torch.enable_grad():
                leaf = run.hidden[number][index].detach().requires_grad_()
                output, taps = engine.layer_with_taps(index, weights, leaf, call)
                written = [leaf, taps.attention_out, taps.mlp_out]
                gradients[number], *slopes = torch.autograd.grad(output, written, gradients[number])
            call = other.entries[number].calls[index]
            _, there = engine.layer_with_taps(index, theirs, other.hidden[number][index], call)
            for kind, slope, mine, own, project in (
                ("head", slopes[0], taps.z, there.z, engine.attention_projection),
                ("neuron", slopes[1], taps.n, there.n, engine.mlp_projection),
            ):
                change = _along(slope, own, project(theirs)) - _along(slope, mine.detach(), project(weights))
                effects[kind][index] += change.view(effects[kind].shape[1], -1).sum(dim=1).cpu()
    return effects


def _along(
    slope: Float[Tensor, "1 T D"], active: Float[Tensor, "1 T H"], projection: Float[Tensor, "D H"]
) -> Float[Tensor, " H"]:
    """What each input of an output projection adds to F, summed over positions."""
    return ((slope[0] @ projection) * active[0]).double().sum(dim=0)
