"""How far a ranking would come out again: on other prompts, in other words, from other seeds, one layer up or down.

Definitions: docs/method.md, section "What makes a ranking believed".

Shape suffixes: n prompts, G units.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wpmerge.agreement import agreement, spearman, stability
from wpmerge.anchor import Anchor
from wpmerge.attribution import UnitArrays, linear
from wpmerge.capability import MINIMUM, Capability, reference_sequences
from wpmerge.errors import CapabilityError
from wpmerge.models import Family, continuations
from wpmerge.pieces import Pieces
from wpmerge.readings import Case, Progress, ScoreSettings, make_reading, some_of
from wpmerge.readouts import LogProbReadout
from wpmerge.rows import pack

SEEDS = 3
"""Other draws of prompts that are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A ranking, and what its stability is measured with.

    Attributes:
        family: the models.
        name: of the expert.
        stored: the ranking's numbers.
        moved: units in which base and expert differ; the others are left out.
        flat: an estimate's arrays as one number per unit.
        options: what the scores were taken with.
        seed: of bootstrap draws.
        pieces: keep finished effects.
        tell: told what is being done.
    """

    family: Family
    name: str
    stored: Float[Tensor, " G"]
    moved: Bool[Tensor, " G"]
    flat: Callable[[UnitArrays], Float[Tensor, " G"]]
    options: ScoreSettings
    seed: int
    pieces: Pieces
    tell: Progress


def measure_stability(
    judged: Judged,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    capability: Capability | None,
    held: Case | None,
    anchor: Anchor | None,
) -> dict[str, Any]:
    """Rank stability of linear effects; docs/formats.md states the result.

    Args:
        judged: the ranking.
        sequences: held-out prompts with their references.
        starts: where each reference starts.
        capability: all prompts; None where they cannot be read, and then only ``sequences`` are used.
        held: the held-out prompts as a case.
        anchor: where the scores have one.
    """
    effects = _effects(judged, "prompts", sequences, starts)
    found: dict[str, Any] = asdict(stability(effects, judged.stored[judged.moved], seed=judged.seed))
    found |= {"paraphrases": None, "seeds": None, "layers": None}
    if capability is not None and held is not None:
        found["paraphrases"] = _paraphrases(judged, capability, held, count=len(starts))
        found["seeds"] = _seeds(judged, capability, count=len(starts))
        if anchor is not None:
            found["layers"] = _layers(judged, held, anchor, count=len(starts))
    return found


def _effects(
    judged: Judged, key: str, sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> Float[Tensor, "n G"]:
    """Each moved unit's effect on the reference log-probability, prompt by prompt."""
    family = judged.family
    base, expert = family.weights[""], family.weights[judged.name]

    def compute() -> dict[str, Tensor]:
        found = []
        for number, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            judged.tell(f"{judged.name}: rank stability, {key}", number, len(starts))
            one = LogProbReadout(layer=family.layout.layers - 1, sequences=[sequence], starts=[start])
            (arrays,) = linear(family.engine, base, [expert], pack([sequence]), one)
            found.append(judged.flat(arrays))
        return {"effects": torch.stack(found)}

    return judged.pieces.tensors(f"stability-{key}", compute)["effects"][:, judged.moved]


def _on_prompts(judged: Judged, key: str, capability: Capability) -> Float[Tensor, "n G"]:
    """The same for prompts whose references may be the expert's own replies, not yet known."""
    family, limit = judged.family, judged.options.reference_tokens
    replies: list[list[int]] | None = None
    if not capability.has_references:
        texts = [prompt.prompt for prompt in capability.prompts]
        made = judged.pieces.record(
            f"stability-replies-{key}", lambda: {"replies": continuations(family, judged.name, texts, tokens=limit)}
        )
        replies = made["replies"]
    sequences, starts = reference_sequences(family.chat, capability, replies, limit=limit)
    return _effects(judged, key, sequences, starts)


def _paraphrases(judged: Judged, capability: Capability, held: Case, *, count: int) -> dict[str, Any] | None:
    """The held-out queries in two wordings each; None where fewer than four have two."""
    queries = list(dict.fromkeys(prompt.asked for prompt in held.scored.prompts))[:count]
    pair = capability.paraphrases(queries)
    if pair is None:
        return None
    both = [_on_prompts(judged, f"wording-{number}", wording) for number, wording in enumerate(pair)]
    return {"queries": len(pair[0].prompts), **asdict(agreement(both, paired=True, seed=judged.seed))}


def _seeds(judged: Judged, capability: Capability, *, count: int) -> dict[str, Any] | None:
    """As many prompts as were held out, drawn as ``score`` would with other seeds; None where there are too few."""
    options = judged.options
    seeds = [options.seed + 1 + number for number in range(SEEDS)]
    drawn = []
    for seed in seeds:
        try:
            scored, _ = capability.split(scoring=max(count, MINIMUM), held_out=options.held_out, seed=seed)
        except CapabilityError:
            return None
        drawn.append(scored)
    effects = [_on_prompts(judged, f"seed-{seed}", scored) for seed, scored in zip(seeds, drawn, strict=True)]
    sets = [{prompt.prompt for prompt in scored.prompts} for scored in drawn]
    pairs = [(one, other) for place, one in enumerate(sets) for other in sets[place + 1 :]]
    stored = [spearman(each.mean(dim=0), judged.stored[judged.moved]) for each in effects]
    return {
        "seeds": seeds,
        "prompts": min(len(scored.prompts) for scored in drawn),
        "shared": sum(len(one & other) / len(one) for one, other in pairs) / len(pairs),
        "stored": sum(stored) / len(stored),
        **asdict(agreement(effects, paired=False, seed=judged.seed)),
    }


def _layers(judged: Judged, held: Case, anchor: Anchor, *, count: int) -> dict[str, Any]:
    """The anchor read one layer below and above l*, each along its own direction; units that both see."""
    family = judged.family
    base, expert = family.weights[""], family.weights[judged.name]

    def at(layer: int) -> Float[Tensor, "n G"]:
        def compute() -> dict[str, Tensor]:
            found = []
            for number in range(min(count, len(held.starts))):
                judged.tell(f"{judged.name}: rank stability, anchor at layer {layer}", number, count)
                one = some_of(held, [number])
                reading = make_reading(family, one, replace(anchor, layer=layer), judged.options, count=1)
                (arrays,) = linear(family.engine, base, [expert], reading.rows, reading.readout)
                found.append(judged.flat(arrays))
            return {"effects": torch.stack(found)}

        return judged.pieces.tensors(f"stability-layer-{layer}", compute)["effects"][:, judged.moved]

    own = at(anchor.layer)
    near = [layer for layer in (anchor.layer - 1, anchor.layer + 1) if 0 <= layer < family.layout.layers]
    return {
        "l_star": anchor.layer,
        "neighbours": {
            str(layer): asdict(agreement([own, at(layer)], paired=True, seed=judged.seed)) for layer in near
        },
    }
