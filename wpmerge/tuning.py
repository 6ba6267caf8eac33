"""What a rule may look at: the scores of each group, and the prompts that choose coefficients, read with the models."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from wpmerge.arch import Layout
from wpmerge.attribution import UnitArrays, empty_arrays
from wpmerge.calibration import HeldOutReading, read_held_out, read_replies
from wpmerge.coefficients import Grouping, group_scores
from wpmerge.errors import RecipeError
from wpmerge.models import Family, continuations
from wpmerge.pieces import Pieces
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
            sequences = [list(each) for each in record.held_out.sequences]
            readings[name] = read_references(
                family,
                "" if record.retain else name,
                sequences,
                record.held_out.starts,
                prompts="held-out prompts",
                mend="score with more held-out prompts (--held-out), or give scales with --scale",
            )
    return readings


def scored_readings(
    family: Family, scores: Scores, experts: Sequence[str], *, pieces: Pieces | None = None
) -> dict[str, HeldOutReading]:
    """The prompts that scores were taken on, with each expert's (of a retain set the base's) own replies to them.

    The replies are made anew: prompts are all that the scores keep of them, and all that a user has to bring.

    Args:
        family: writes the replies.
        scores: know the prompts.
        experts: whose prompts; those of retain sets too.
        pieces: keeps the replies; None keeps them nowhere.
    """
    limit = reference_limit(scores)

    def replies_of(expert: str, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"replies": continuations(family, expert, texts, tokens=limit)}

    readings = {}
    for name, record in scores.capabilities.items():
        if record.retain or name in experts:
            texts = list(record.scored)
            heads = [family.chat.prompt_tokens(text) for text in texts]
            write = partial(replies_of, "" if record.retain else name, texts)
            replies = (write() if pieces is None else pieces.record(f"scored-{name}", write))["replies"]
            pairs = [(head, reply) for head, reply in zip(heads, replies, strict=True) if reply]
            sequences, starts = [[*head, *reply] for head, reply in pairs], [len(head) for head, _ in pairs]
            expert = "" if record.retain else name
            mend = "score with more prompts (--prompts), or take a rule that takes no steps on them"
            readings[name] = read_references(family, expert, sequences, starts, prompts="scored prompts", mend=mend)
    return readings


def reference_limit(scores: Scores) -> int:
    """The longest reference that the scores were taken with, tokens.

    Raises:
        RecipeError: they do not say.
    """
    found = (scores.provenance.get("settings") or {}).get("reference_tokens")
    if not isinstance(found, int) or found < 1:
        raise RecipeError("the scores do not say how long a reference may be", got=found, mend="score again")
    return found


def read_references(
    family: Family, expert: str, sequences: Sequence[Sequence[int]], starts: Sequence[int], *, prompts: str, mend: str
) -> HeldOutReading:
    """What a merge is judged by: how much of an expert's replies it keeps, or how likely it finds the base's.

    Args:
        family: base and experts.
        expert: whose skill; ``""`` for a retain set.
        sequences: prompt and reference tokens.
        starts: where each reference starts.
        prompts: which ones they are, for a message.
        mend: what to do where the expert is no better, for a message.

    Raises:
        CapabilityError: the expert is no better than the base on them.
    """
    readout = LogProbReadout(layer=family.layout.layers - 1, sequences=sequences, starts=list(starts))
    rows, base = pack(sequences, tokens_per_row=TOKENS_PER_ROW), family.weights[""]
    if not expert:
        return read_held_out(family.engine, base, None, readout, rows)
    own = family.weights[expert]
    return read_replies(family.engine, base, own, readout, rows, name=expert, prompts=prompts, mend=mend)
