"""Vector anchors: a direction in the residual stream that says "the control state of the capability has formed".

Formulas and the layer choice: docs/method.md, section "Readouts" (contrast anchor: arXiv:2604.13694 with the steering
vector of Stolfo et al., ICLR 2025; cross-fitting, the carried share and the layer choice are this project's).

Shape suffixes: n items (pairs or prompts), L layers, D residual width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.engine import Engine
from wpmerge.errors import AnchorError
from wpmerge.readouts import AnchorReadout
from wpmerge.rows import Row
from wpmerge.weights import WeightSource

COSINE = 0.9
"""Least split-half cosine of a reliable direction."""
LEAST_T = 5.0
"""Least cross-fitted t of the chosen layer: there are tens of layers to choose from, and on pure noise this t has a
standard deviation of about 1.4 (contrast) to 1.7 (pair), since each half is read with the other's direction."""
SHARE_OF_CARRIED = 0.5
"""Least carried share of the chosen layer, as a part of the largest over layers: there the capability has formed."""
LEAST_CARRIED = 0.01
"""Least carried share of the chosen layer in itself. On SmolLM2's experts the anchors of what was learned carry .02 to
.9 of the gap, and those of instructions that were not (language, number of words) .003: they tell two prompts apart."""
DEPTH = 0.9
"""The chosen layer is no later than this share of the depth."""

HALVES = (slice(0, None, 2), slice(1, None, 2))
"""Two halves of the prompts, as they stand: every second one, and the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorPoint:
    """What an anchor at one layer is worth.

    Attributes:
        layer: the residual stream after it is read.
        cosine: between the directions from two halves of the prompts, −1 to 1.
        gap: cross-fitted F(expert) − F(base), in residual-stream units: each half read with the other's direction.
        t: that gap's t-statistic over items.
        carried: share of the behavioural gap that the direction carries here, to first order: what moving the base's
            stream along it, as far as the expert's is, would do to the reference log-probability. Cross-fitted too;
            None where there is no gap to carry.
    """

    layer: int
    cosine: float
    gap: float
    t: float
    carried: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Anchor:
    """A direction, the layer it is read at, and the curve the layer was chosen from.

    Attributes:
        kind: "contrast" of prompts with and without the instruction, or "pair" of expert and base.
        layer: l*.
        directions: v of every layer, unit length, from all prompts.
        halves: the same from every second prompt, beginning with the first, and from the others.
        curve: one point per layer.
        reliable: whether the layer passed the criteria.
    """

    kind: Literal["contrast", "pair"]
    layer: int
    directions: Float[Tensor, "L D"]
    halves: Float[Tensor, "2 L D"]
    curve: tuple[AnchorPoint, ...]
    reliable: bool

    @property
    def direction(self) -> Float[Tensor, " D"]:
        """v at l*."""
        return self.directions[self.layer]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Behaviour:
    """What the residual stream at a prompt's last token does to the behavioural readout.

    Attributes:
        slopes: ∂F/∂a_l in the base's run, F being the reference log-probability.
        moves: a_l(x; expert) − a_l(x; base), for a contrast pair's prompt with the instruction.
        gap: F(expert) − F(base).
    """

    slopes: Float[Tensor, "n L D"]
    moves: Float[Tensor, "n L D"]
    gap: float


@torch.no_grad()
def token_states(
    engine: Engine, source: WeightSource, rows: Sequence[Row], count: int, *, starts: Sequence[int] | None = None
) -> Float[Tensor, "n L D"]:
    """The residual stream after every layer, float64, at each of ``count`` sequences' last token.

    With ``starts`` it is the mean over the tokens from there on.
    """
    layout = engine.layout
    found = torch.empty(count, layout.layers, layout.hidden, dtype=torch.float64)
    outer = source.outer(layout.input_tensors())
    entries = [engine.embed(outer, row) for row in rows]
    del outer
    states = [entry.hidden for entry in entries]
    for index in range(layout.layers):
        weights = source.layer(index)
        for number, (row, entry) in enumerate(zip(rows, entries, strict=True)):
            states[number] = engine.layer(index, weights, states[number], entry.calls[index])
            for item, place in row.places.items():
                read = place[-1 if starts is None else starts[item] :]
                found[item, index] = states[number][0, read].double().mean(dim=0).cpu()
    return found


def fit_anchor(
    expert_states: Float[Tensor, "n L D"],
    base_states: Float[Tensor, "n L D"],
    behaviour: Behaviour,
    *,
    kind: Literal["contrast", "pair"],
    name: str,
    layer: int | None = None,
    accept: bool = False,
) -> Anchor:
    """Fit a direction per layer, judge each layer by cross-fitting, and choose one.

    Args:
        expert_states: per item what is projected: for a contrast anchor a_l(x⁺) − a_l(x⁻), for a pair anchor a_l(x).
        base_states: the same in the base.
        behaviour: what the streams do to the output.
        kind: contrast: v is the mean of the expert's; pair: of expert minus base.
        name: the capability, for messages.
        layer: l*, if not to be chosen.
        accept: take the best layer even if none is reliable.

    Raises:
        AnchorError: no layer passes, with the numbers of the best; or there is no such layer.
    """
    layers = expert_states.shape[1]
    if layer is not None and not 0 <= layer < layers:
        raise AnchorError("there is no such layer to read", where=name, got=layer, expected=f"0 to {layers - 1}")
    target = expert_states if kind == "contrast" else expert_states - base_states
    change = expert_states - base_states
    directions = [_unit(target[half].mean(dim=0)) for half in HALVES]
    cosines = (directions[0] * directions[1]).sum(dim=-1)
    crossed = torch.cat([torch.einsum("nld,ld->nl", change[HALVES[i]], directions[1 - i]) for i in (0, 1)])
    gaps = crossed.mean(dim=0)
    t = gaps / (crossed.std(dim=0) / len(crossed) ** 0.5).clamp_min(1e-300)
    carried = torch.stack([_carried(behaviour, HALVES[i], directions[1 - i]) for i in (0, 1)]).sum(dim=0)
    curve = tuple(
        AnchorPoint(
            layer=index,
            cosine=float(cosines[index]),
            gap=float(gaps[index]),
            t=float(t[index]),
            carried=float(carried[index]) if behaviour.gap > 0 else None,
        )
        for index in range(layers)
    )
    chosen = layer if layer is not None else _choose(curve)
    reliable = chosen is not None and _passes(curve[chosen], curve)
    if chosen is None:
        if not accept:
            raise _unreliable(curve, name)
        chosen = max(_allowed(curve), key=lambda point: point.t).layer
    return Anchor(
        kind=kind,
        layer=chosen,
        directions=_unit(target.mean(dim=0)).float(),
        halves=torch.stack(directions).float(),
        curve=curve,
        reliable=reliable,
    )


def _unit(vectors: Float[Tensor, "L D"]) -> Float[Tensor, "L D"]:
    return torch.nn.functional.normalize(vectors, dim=-1, eps=1e-300)


def _allowed(curve: Sequence[AnchorPoint]) -> list[AnchorPoint]:
    return [point for point in curve if point.layer + 1 <= max(1, int(DEPTH * len(curve)))]


def _choose(curve: Sequence[AnchorPoint]) -> int | None:
    """The smallest layer whose direction is stable, separates the models, and carries the behaviour."""
    return next((point.layer for point in _allowed(curve) if _passes(point, curve)), None)


def _carried(behaviour: Behaviour, half: slice, directions: Float[Tensor, "L D"]) -> Float[Tensor, " L"]:
    """Σ ⟨∂F, v⟩⟨move, v⟩ over some items, a share of the gap."""
    slopes, moves = (
        torch.einsum("nld,ld->nl", states[half], directions) for states in (behaviour.slopes, behaviour.moves)
    )
    return (slopes * moves).sum(dim=0) / behaviour.gap


def _passes(point: AnchorPoint, curve: Sequence[AnchorPoint]) -> bool:
    formed = (point.carried or 0.0) >= _carried_enough(curve)
    return formed and point.t >= LEAST_T and point.cosine >= COSINE


def _carried_enough(curve: Sequence[AnchorPoint]) -> float:
    most = max(point.carried or 0.0 for point in _allowed(curve))
    return max(LEAST_CARRIED, SHARE_OF_CARRIED * most)


def _unreliable(curve: Sequence[AnchorPoint], name: str) -> AnchorError:
    best = max(_allowed(curve), key=lambda point: point.t)
    return AnchorError(
        "no layer gives a reliable anchor for this capability",
        where=name,
        got=f"best at layer {best.layer}: cross-fitted t {best.t:.1f}, split-half cosine {best.cosine:.2f}, "
        f"carried share {'none' if best.carried is None else format(best.carried, '.2g')}",
        expected=f"cosine at least {COSINE}, t at least {LEAST_T}, carried share at least {_carried_enough(curve):.2g}",
        mend="more prompts (--prompts), or --accept-anchor, --layer N, or --readout reference",
    )


def anchor_readout(anchor: Anchor, items: int) -> AnchorReadout:
    """The anchor as a readout. Contrast sequences come as x⁺₀, x⁻₀, x⁺₁, x⁻₁, …; pair sequences as x₀, x₁, …"""
    per_item = 2 if anchor.kind == "contrast" else 1
    numbers = range(items * per_item)
    return AnchorReadout(
        layer=anchor.layer,
        direction=anchor.direction,
        item=[number // per_item for number in numbers],
        sign=[1.0 if number % per_item == 0 else -1.0 for number in numbers],
        items=items,
    )
