"""From a capability's prompts to readouts: split, let the expert reply, fit the anchor, pack what is read."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from wpmerge.anchor import Anchor, Behaviour, anchor_readout, fit_anchor, token_states
from wpmerge.arch import KINDS, Kind
from wpmerge.capability import Capability, reference_sequences
from wpmerge.errors import CapabilityError, WpmergeError
from wpmerge.estimators import EstimatorName
from wpmerge.gradients import state_gradients
from wpmerge.memory import held_per_token
from wpmerge.models import Family, continuations
from wpmerge.pieces import Pieces
from wpmerge.readouts import DivergenceReadout, LogProbReadout, Readout, measure, read_places
from wpmerge.rows import Row, pack, row_groups
from wpmerge.scores import AskedReadout, CapabilityRecord, Direction, HeldOut, ReadoutName

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, units of it done, and units in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings:
    """What ``wpmerge score`` may be told.

    Attributes:
        readouts: the first one's scores carry the capability's own name and are what coefficients rest on. "auto",
            only as the first, stands for the one that :func:`wpmerge.reliability.choose` finds for each capability.
        prompts: prompts (or pairs) per capability to score on.
        held_out: further prompts per capability, kept for choosing coefficients.
        reference_tokens: longest reference, tokens.
        top: strongest units of each kind to verify; 0 with ``sample`` 0 verifies nothing.
        sample: random others of each kind to verify.
        verify_prompts: prompts the verification uses.
        kinds: unit kinds to score.
        cross: score every expert's units on every capability, not only on its own.
        estimators: which numbers are found for every unit; ``linear`` always is, since it screens.
        directions: "sufficiency", the base with a unit from the expert, always; and "necessity", the expert with it
            from the base, for an expert's own capability.
        integrated_points: Gauss–Legendre points of the integrated estimator.
        max_memory: what the process's resident memory is planned to stay within, bytes; None for no limit.
        layer: l* for every anchor, instead of choosing.
        accept_anchor: go on with an unreliable anchor or gap.
        tokens_per_row: tokens packed into one row.
        seed: of prompt splits and random draws.
        vocab: "base" cuts an expert with a larger vocabulary to the base's rows; None refuses it.
    """

    readouts: tuple[AskedReadout, ...] = ("reference", "anchor")
    prompts: int = 32
    held_out: int = 16
    reference_tokens: int = 96
    top: int = 32
    sample: int = 64
    verify_prompts: int = 4
    kinds: tuple[Kind, ...] = KINDS
    cross: bool = True
    estimators: tuple[EstimatorName, ...] = ("linear",)
    directions: tuple[Direction, ...] = ("sufficiency",)
    integrated_points: int = 4
    max_memory: int | None = None
    layer: int | None = None
    accept_anchor: bool = False
    tokens_per_row: int = 384
    seed: int = 0
    vocab: Literal["base"] | None = None

    def __post_init__(self) -> None:
        for name, given, needed in (
            ("estimators", self.estimators, "linear"),
            ("directions", self.directions, "sufficiency"),
        ):
            if needed not in given:
                raise WpmergeError(
                    f"{name} leave {needed} out, on which screening and coefficients rest",
                    got=", ".join(given) or "none",
                    mend=f"add {needed}",
                )
        if "auto" in self.readouts[1:]:
            raise WpmergeError(
                "the readout auto is not the first, whose scores coefficients rest on",
                got=", ".join(self.readouts),
                mend="give --readout auto first",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One capability, split, with its references as tokens.

    Attributes:
        scored: the prompts to score on.
        held_out: those kept for choosing coefficients.
        sequences: prompt and reference of each scored prompt.
        starts: where each reference starts.
        references: "given", or whose greedy replies they are: the "expert"'s or, of a retain set, the "base"'s.
        retain: it has no expert.
    """

    scored: Capability
    held_out: HeldOut
    sequences: list[list[int]]
    starts: list[int]
    references: Literal["given", "expert", "base"]
    retain: bool

    @property
    def own(self) -> str:
        """The model that shows it: the expert of its name or, of a retain set, the base, whose name is empty."""
        return "" if self.retain else self.scored.name


def some_of(case: Case, numbers: Sequence[int]) -> Case:
    """The case with some of its scored prompts only."""
    prompts = tuple(case.scored.prompts[number] for number in numbers)
    return replace(
        case,
        scored=replace(case.scored, prompts=prompts),
        sequences=[case.sequences[number] for number in numbers],
        starts=[case.starts[number] for number in numbers],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A readout with the rows it reads, on all scored prompts or some."""

    readout: Readout
    rows: list[Row]


def prepare_case(
    family: Family,
    capability: Capability,
    settings: ScoreSettings,
    pieces: Pieces,
    tell: Progress,
    *,
    retain: bool = False,
) -> Case:
    """Split a capability, and let its expert, or for a retain set the base, write references where none are given."""
    scored, held_out = capability.split(scoring=settings.prompts, held_out=settings.held_out, seed=settings.seed)
    replies: list[list[int]] | None = None
    if not capability.has_references:
        texts = [prompt.prompt for prompt in (*scored.prompts, *held_out.prompts)]

        def write() -> dict[str, Any]:
            source = "" if retain else capability.name
            tell(f"{capability.name}: the {'base' if retain else 'expert'}'s own replies", 0, 1)
            return {"replies": continuations(family, source, texts, tokens=settings.reference_tokens)}

        replies = pieces.record(f"replies-{capability.name}", write)["replies"]
    count = len(scored.prompts)
    parts = (replies[:count], replies[count:]) if replies is not None else (None, None)
    limit = settings.reference_tokens
    sequences, starts = reference_sequences(family.chat, scored, parts[0], limit=limit)
    other, other_starts = reference_sequences(family.chat, held_out, parts[1], limit=limit)
    kept = HeldOut(
        prompts=tuple(prompt.prompt for prompt in held_out.prompts),
        sequences=tuple(tuple(sequence) for sequence in other),
        starts=tuple(other_starts),
    )
    _check_length(family, capability, [*sequences, *other, *_anchor_sequences(family, scored)])
    _say_what_is_less(family, capability, settings, scored, held_out)
    references: Literal["given", "expert", "base"] = "base" if retain else "expert"
    return Case(
        scored=scored,
        held_out=kept,
        sequences=sequences,
        starts=starts,
        references="given" if replies is None else references,
        retain=retain,
    )


def fit_case_anchor(family: Family, case: Case, settings: ScoreSettings, held_bytes: int) -> Anchor:
    """Run expert and base on a capability's prompts, and fit the anchor that they give."""
    prompts = case.scored.prompts
    rows = pack(_anchor_sequences(family, case.scored), tokens_per_row=settings.tokens_per_row)
    per_item = 2 if case.scored.has_pairs else 1
    states = [
        token_states(family.engine, family.weights[name], rows, len(prompts) * per_item) for name in (case.own, "")
    ]
    reference = make_reading(family, case, None, settings, count=len(prompts))
    last, tokens = family.layout.layers - 1, [start - 1 for start in case.starts]
    groups = row_groups(reference.rows, held_bytes // held_per_token(family.layout, last))
    slopes = sum(
        (state_gradients(family.engine, family.weights[""], group, reference.readout, tokens) for group in groups),
        start=torch.zeros(()),
    )
    after, before = (
        float(measure(family.engine, family.weights[name], reference.rows, reference.readout).double().mean())
        for name in (case.own, "")
    )
    behaviour = Behaviour(slopes=slopes, moves=states[0][::per_item] - states[1][::per_item], gap=after - before)
    if case.scored.has_pairs:
        states = [found[0::2] - found[1::2] for found in states]
    return fit_anchor(
        states[0],
        states[1],
        behaviour,
        kind="contrast" if case.scored.has_pairs else "pair",
        name=case.scored.name,
        layer=settings.layer,
        accept=settings.accept_anchor,
    )


def _anchor_sequences(family: Family, capability: Capability, count: int | None = None) -> list[list[int]]:
    texts = []
    for prompt in capability.prompts[:count]:
        texts += [prompt.prompt] if prompt.without is None else [prompt.prompt, prompt.without]
    return [family.chat.prompt_tokens(text) for text in texts]


def positions(family: Family) -> int | None:
    """How many tokens the models were made for; None if their configuration does not say."""
    config = family.layout.config
    limit: int | None = config.get("n_positions") or config.get("max_position_embeddings")
    return limit


def _check_length(family: Family, capability: Capability, sequences: Sequence[Sequence[int]]) -> None:
    """Refuse prompts beyond the positions that the model was made for."""
    limit = positions(family)
    longest = max(sequences, key=len)
    if limit and len(longest) > limit:
        raise CapabilityError(
            "a prompt is longer than the model's window",
            where=f"{capability.name} ({capability.source})",
            got=f"{len(longest)} tokens: {family.chat.tokenizer.decode(longest)[:60]!r}…",
            expected=f"at most {limit} tokens, prompt and reference together",
            mend="shorten or remove it",
        )


def _say_what_is_less(
    family: Family, capability: Capability, settings: ScoreSettings, scored: Capability, held_out: Capability
) -> None:
    """Say where fewer prompts than asked for are used, and where references are cut."""
    found, asked = (len(scored.prompts), len(held_out.prompts)), (settings.prompts, settings.held_out)
    if found != asked:
        text = "%s: %d prompts to score on and %d held out, not the %d and %d asked for"
        logger.warning(text, capability.name, *found, *asked)
    given = [prompt.reference for part in (scored, held_out) for prompt in part.prompts if prompt.reference is not None]
    limit = settings.reference_tokens
    cut = sum(len(family.chat.reply_tokens(reference, limit=limit + 1)) > limit for reference in given)
    if cut:
        text = "%s: %d of %d references are cut to their first %d tokens (--reference-tokens)"
        logger.warning(text, capability.name, cut, len(given), limit)


def make_reading(
    family: Family,
    case: Case,
    anchor: Anchor | None,
    settings: ScoreSettings,
    *,
    count: int,
    name: ReadoutName = "reference",
) -> Reading:
    """A readout on the first ``count`` scored prompts: the anchor's, if one is given, or the named behavioural one."""
    if anchor is not None:
        sequences = _anchor_sequences(family, case.scored, count)
        rows = pack(sequences, tokens_per_row=settings.tokens_per_row)
        return Reading(readout=anchor_readout(anchor, count), rows=rows)
    sequences, starts = case.sequences[:count], case.starts[:count]
    rows, last = pack(sequences, tokens_per_row=settings.tokens_per_row), family.layout.layers - 1
    readout = LogProbReadout(layer=last, sequences=sequences, starts=starts)
    if name == "reference":
        return Reading(readout=readout, rows=rows)
    teacher = family.weights[case.own]
    return Reading(
        readout=DivergenceReadout(
            layer=last,
            sequences=sequences,
            starts=starts,
            teacher=read_places(family.engine, teacher, rows, readout),
            teacher_outer=teacher.outer(family.layout.output_tensors()),
        ),
        rows=rows,
    )


def capability_record(capability: Capability, case: Case) -> CapabilityRecord:
    return CapabilityRecord(
        source=capability.source,
        content_hash=capability.content_hash(),
        retain=case.retain,
        scored=tuple(prompt.prompt for prompt in case.scored.prompts),
        references=case.references,
        held_out=case.held_out,
    )
