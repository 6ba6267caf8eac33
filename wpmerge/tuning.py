"""What a rule may look at: the scores of each group, and the prompts that choose coefficients, read with the models."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.arch import Layout
from wpmerge.attribution import UnitArrays, empty_arrays
from wpmerge.calibration import HeldOutReading, read_held_out
from wpmerge.coefficients import Grouping, group_scores
from wpmerge.errors import CapabilityError, RecipeError
from wpmerge.models import Family, continuations
from wpmerge.readouts import LogProbReadout
from wpmerge.rows import pack
from wpmerge.scores import Scores, array_key

TOKENS_PER_ROW = 384


def own_scores(scores: Scores, name: str, layout: Layout) -> UnitArrays:
    """An expert's recoveries on its own capability; NaN for kinds of units that were left out of the scoring."""
    return _arrays(scores, name, name, layout)


def _arrays(scores: Scores, label: str, expert: str, layout: Layout) -> UnitArrays:
    found = empty_arrays(layout)
    for kind in found:
        if (key := array_key("linear", label, expert, kind)) in scores.arrays:
            found[kind] = scores.arrays[key]
    return found


def effects_of(
    scores: Scores, layout: Layout, grouping: Grouping, experts: Sequence[str]
) -> dict[str, Float[Tensor, "E G"]]:
    """Capability or retain set → each group's effect from each expert; those that scores are there for."""
    found = {}
    for label, record in scores.capabilities.items():
        if record.retain or label in experts:
            arrays = [_arrays(scores, label, expert, layout) for expert in experts]
            found[label] = torch.stack([group_scores(layout, grouping, each) for each in arrays])
    return {label: each for label, each in found.items() if not each.isnan().all()}


def check_scored(own: Float[Tensor, "E G"], experts: Sequence[str]) -> None:
    """Refuse an expert without a single score.

    Args:
        own: each group's recovery from each expert, NaN where no score reaches.
        experts: their names.

    Raises:
        RecipeError: names the first such expert.
    """
    for name, scores in zip(experts, own, strict=True):
        if bool(scores.isnan().all()):
            raise RecipeError(
                "the scores hold nothing that this rule could weigh",
                got=f"no score of a finest unit for the expert {name}",
                expected="heads, neurons, norms, biases or embeddings",
                mend="score again without --kind, or take --rule scaled or refine",
            )


def check_cross(scores: Scores, layout: Layout, experts: Sequence[str]) -> None:
    """Refuse scores without cross effects of the finest units.

    Raises:
        RecipeError: names the first that is missing.
    """
    for label in experts:
        for expert in experts:
            keys = [array_key("linear", label, expert, kind) for kind in empty_arrays(layout)]
            if not any(key in scores.arrays for key in keys):
                raise RecipeError(
                    "rule joint weighs what every expert does to every capability, and the scores do not say it",
                    got=f"no effects of {expert} on {label}",
                    mend="score again with --cross, or take another rule",
                )


def held_out_readings(family: Family, scores: Scores, experts: Sequence[str]) -> dict[str, HeldOutReading]:
    """The prompts that the scores kept, retain sets included, with what base and experts read there.

    Raises:
        CapabilityError: an expert is no better than the base on them.
    """
    readings = {}
    for name, record in scores.capabilities.items():
        if record.retain or name in experts:
            held = record.held_out
            readings[name] = _read(family, name, record.retain, [list(each) for each in held.sequences], held.starts)
            if not record.retain and readings[name].expert <= readings[name].base:
                raise CapabilityError(
                    f"on the held-out prompts the expert {name} is no better than the base",
                    got=f"{readings[name].expert:.4g} and {readings[name].base:.4g} nats per token",
                    mend="score with more held-out prompts (--held-out), or give scales with --scale",
                )
    return readings


def scored_readings(family: Family, scores: Scores, experts: Sequence[str]) -> dict[str, HeldOutReading]:
    """The prompts that scores were taken on, with each expert's (of a retain set the base's) own replies to them.

    The replies are made anew: prompts are all that the scores keep of them, and all that a user has to bring.
    """
    limit = reference_limit(scores)
    readings = {}
    for name, record in scores.capabilities.items():
        if record.retain or name in experts:
            texts = list(record.scored)
            heads = [family.chat.prompt_tokens(text) for text in texts]
            replies = continuations(family, "" if record.retain else name, texts, tokens=limit)
            pairs = [(head, reply) for head, reply in zip(heads, replies, strict=True) if reply]
            sequences = [[*head, *reply] for head, reply in pairs]
            readings[name] = _read(family, name, record.retain, sequences, [len(head) for head, _ in pairs])
    return readings


def reference_limit(scores: Scores) -> int:
    """The longest reference that the scores were taken with, tokens."""
    return int(scores.provenance["settings"]["reference_tokens"])


def _read(family: Family, name: str, retain: bool, sequences: list[list[int]], starts: Sequence[int]) -> HeldOutReading:
    readout = LogProbReadout(layer=family.layout.layers - 1, sequences=sequences, starts=list(starts))
    rows = pack(sequences, tokens_per_row=TOKENS_PER_ROW)
    expert = None if retain else family.weights[name]
    return read_held_out(family.engine, family.weights[""], expert, readout, rows)
