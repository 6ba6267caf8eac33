"""Questions that people ask a chat model, out of the model itself: for retain sets that nobody has to write.

A chat model has learned to write both sides of a conversation. Where a prompt ends in the opening of the user's turn,
it writes what users ask: Magpie (Xu et al., 2024, arXiv:2406.08464), there for instruction data. As a retain set such
questions stand for more kinds than a list by hand does (docs/log.md, "Retain sets that the base asks itself").
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wpmerge.errors import CapabilityError, check_ranges
from wpmerge.models import Family, end_tokens, generation_model, open_family
from wpmerge.output import check_output_file, write_own_file
from wpmerge.readings import Progress, positions

LEAST_WORDS = 3
"""Words below which nothing is asked."""
BATCH = 32
"""Questions drawn together."""
DRAWS = 8
"""Times as many draws as questions that are wanted, before it is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSettings:
    """How questions are drawn.

    Attributes:
        count: how many, each another.
        longest: tokens that are drawn for one, what ends it included; one that has not ended then is dropped.
        temperature: of the sampling.
        top_p: share of the probability that is drawn from.
        seed: of the sampling.

    Raises:
        CapabilityError: a number out of its range.
    """

    count: int = 120
    longest: int = 64
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "count": (4, 100_000),
            "longest": (4, 4096),
            "temperature": (0.01, 10.0),
            "top_p": (0.01, 1.0),
            "seed": (0, 2**63 - 1),
        }
        check_ranges(self, ranges, kind=CapabilityError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What was drawn.

    Attributes:
        out: the JSONL file, ``{"prompt": …}`` a line.
        texts: the questions.
        draws: how many were drawn; the others were unfinished, too short, or there already.
    """

    out: Path
    texts: tuple[str, ...]
    draws: int


def write_questions(
    model: str,
    out: Path,
    *,
    settings: QuestionSettings | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Questions:
    """Let a chat model ask itself, and keep what it asks as prompts.

    Args:
        model: a directory or a hub id; its weights are held in memory, float32.
        out: the JSONL file to be made.
        settings: see :class:`QuestionSettings`.
        device: where it runs, as torch names it.
        overwrite: replace the file, once there are questions.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.
        progress: told how many there are.

    Raises:
        OutputError: the file is there already, or cannot be.
        CheckpointError: the model cannot be read.
        CapabilityError: it does not ask enough: it may be no chat model.
    """
    settings = settings or QuestionSettings()
    check_output_file(out, overwrite=overwrite)
    family = open_family(model, {}, device=device, trust_remote_code=trust_remote_code)
    found: dict[str, None] = {}
    drawn = 0
    for text in _drawn(family, settings):
        drawn += 1
        if text is not None and len(text.split()) >= LEAST_WORDS:
            found[text] = None
        if progress is not None:
            progress("questions", len(found), settings.count)
        if len(found) == settings.count:
            break
    else:
        raise CapabilityError(
            "the model asks too few questions of itself",
            where=model,
            got=f"{len(found)} that are finished within {settings.longest} tokens and differ, in {drawn} draws",
            expected=f"{settings.count}",
            mend="it takes a chat model: ask for fewer or for longer ones, or write them by hand",
        )
    write_own_file(out, "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in found))
    return Questions(out=out, texts=tuple(found), draws=drawn)


@torch.no_grad()
def _drawn(family: Family, settings: QuestionSettings) -> Iterator[str | None]:
    """One draw after another; None for one that was not finished."""
    tokenizer, device = family.chat.tokenizer, family.engine.device
    head, end = family.chat.user_turn()
    window = positions(family)
    if window and len(head) + settings.longest > window:
        raise CapabilityError(
            "questions would not fit the model's positions",
            got=f"{len(head)} tokens before a question, and up to {settings.longest}",
            expected=f"{window} in all",
        )
    model: Any = generation_model(family.engine, family.weights[""])
    ends = end_tokens(family, "") | ({own[end]} if end in (own := tokenizer.get_added_vocab()) else set())
    marks = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    prompt = torch.tensor([head], device=device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(settings.seed)
        for _ in range(-(-DRAWS * settings.count // BATCH)):
            replies = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                use_cache=True,
                do_sample=True,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=0,
                max_new_tokens=settings.longest,
                num_return_sequences=BATCH,
                eos_token_id=sorted(ends) or None,
                pad_token_id=min(ends, default=0),
            )
            for tokens in replies[:, len(head) :].tolist():
                length = next((n for n, token in enumerate(tokens, start=1) if token in ends), len(tokens))
                written, found, _ = tokenizer.decode(tokens[:length], clean_up_tokenization_spaces=False).partition(end)
                yield written.strip() if found and not any(mark in written for mark in marks) else None
