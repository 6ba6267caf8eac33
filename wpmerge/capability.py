"""Capabilities: named prompt sets, built in or from a user's JSONL, and how their prompts become tokens."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from wpmerge import builtin
from wpmerge.errors import CapabilityError, WpmergeError, reason_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a capability.

    Attributes:
        prompt: what the user says.
        without: the same without the instruction; a capability whose prompts have it gets a contrast anchor.
        reference: a reply that shows the capability; without one the expert's own continuation is taken.
        query: what is asked, however it is put; None takes ``without``, or else the prompt. Not part of the hash.
        instruction: which of a set's instructions it holds; prompts with one query and one instruction are
            paraphrases. Not part of the hash.
    """

    prompt: str
    without: str | None = None
    reference: str | None = None
    query: str | None = None
    instruction: str | None = None

    @property
    def asked(self) -> str:
        """The query."""
        return self.query or self.without or self.prompt


UNHASHED = ("query", "instruction")
"""Fields of a prompt that no model sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """A set of prompts on which an expert shows a behaviour more strongly than the base.

    Attributes:
        name: the expert of the same name is the one the gap is measured to.
        source: the built-in name or the file it came from.
        prompts: at least four, so that halves can be compared.
    """

    name: str
    source: str
    prompts: tuple[Prompt, ...]

    @property
    def has_pairs(self) -> bool:
        """Whether the prompts come with and without an instruction."""
        return self.prompts[0].without is not None

    @property
    def has_references(self) -> bool:
        """Whether the prompts come with replies."""
        return self.prompts[0].reference is not None

    def content_hash(self) -> str:
        """SHA-256 of the prompts, in order."""
        shown = [{key: text for key, text in asdict(prompt).items() if key not in UNHASHED} for prompt in self.prompts]
        text = json.dumps(shown, ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def split(self, *, scoring: int, held_out: int, seed: int) -> tuple["Capability", "Capability"]:
        """Two draws without a query in common: prompts to score on, and prompts to choose coefficients on.

        Each draw takes as many different queries as it can, in a random order.

        Raises:
            CapabilityError: if there are fewer than four prompts for either.
        """
        groups: dict[str, list[Prompt]] = {}
        for prompt in self.prompts:
            groups.setdefault(prompt.asked, []).append(prompt)
        chance = random.Random(seed)
        queries = list(groups.values())
        chance.shuffle(queries)
        for members in queries:
            chance.shuffle(members)
        share = round(len(queries) * held_out / max(1, scoring + held_out))
        kept = min(max(share, min(held_out, MINIMUM)), len(queries) - min(scoring, MINIMUM))
        parts = _in_turn(queries[max(0, kept) :])[:scoring], _in_turn(queries[: max(0, kept)])[:held_out]
        if min(map(len, parts)) < MINIMUM:
            raise CapabilityError(
                "the capability has too few prompts to score on some and choose coefficients on others",
                where=f"{self.name} ({self.source})",
                got=f"{len(queries)} queries: {len(parts[0])} prompts to score on, {len(parts[1])} to keep",
                expected=f"at least {MINIMUM} of each",
                mend="add prompts, or ask for more",
            )
        one, other = (Capability(name=self.name, source=self.source, prompts=tuple(part)) for part in parts)
        return one, other

    def paraphrases(self, queries: Sequence[str]) -> tuple["Capability", "Capability"] | None:
        """Two wordings of the same queries, query by query: prompt i of both asks the same in other words.

        Args:
            queries: which to take, as :attr:`Prompt.asked`; a query that has one wording only is passed over.

        Returns:
            One pair a query, and one instruction a pair; None with fewer than four pairs.
        """
        wordings: dict[str, dict[str | None, list[Prompt]]] = {query: {} for query in queries}
        for prompt in self.prompts:
            if prompt.asked in wordings:
                wordings[prompt.asked].setdefault(prompt.instruction, []).append(prompt)
        pairs = []
        for number, found in enumerate(wordings.values()):
            several = [prompts for prompts in found.values() if len({prompt.prompt for prompt in prompts}) > 1]
            if several:  # the instructions of a joined set in turn
                first, *others = several[number % len(several)]
                pairs.append((first, next(prompt for prompt in others if prompt.prompt != first.prompt)))
        if len(pairs) < MINIMUM:
            return None
        one, other = (replace(self, prompts=tuple(side)) for side in zip(*pairs, strict=True))
        return one, other


def _in_turn(groups: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    """The first of every group, then the second of every group that has one, and so on."""
    return [prompt for turn in zip_longest(*groups) for prompt in turn if prompt is not None]


MINIMUM = 4
"""Prompts below which a split-half says nothing."""


def load_capability(name: str, spec: str) -> Capability:
    """Read a capability.

    Args:
        name: what to call it.
        spec: a built-in name, several joined by "+" (an expert that learned two instructions), or a path to JSONL with
            one ``{"prompt", "without"?, "reference"?, "instruction"?}`` a line; other keys are ignored.

    Raises:
        CapabilityError: no such name or file; names joined of which some have ``without`` or ``reference`` and some
            have not; an empty or malformed file, with its line number.
    """
    if Path(spec).suffix in (".jsonl", ".json") or Path(spec).is_file():
        prompts = _read_jsonl(Path(spec))
    else:
        parts = [_builtin_prompts(part) for part in spec.split("+")]
        prompts = _in_turn(parts)
        _check_alike(prompts, spec)
    if len(prompts) < MINIMUM:
        raise CapabilityError(
            "the capability has too few prompts", where=spec, got=len(prompts), expected=f"at least {MINIMUM}"
        )
    return Capability(name=name, source=spec, prompts=tuple(prompts))


def _builtin_prompts(name: str) -> list[Prompt]:
    if name not in builtin.names():
        raise CapabilityError(
            "there is no such capability",
            got=name,
            expected="a path to a .jsonl file, or one of " + ", ".join(builtin.names()),
        )
    optional = ("without", "reference", "query")
    return [
        Prompt(prompt=entry["prompt"], instruction=name, **{field: entry.get(field) for field in optional})
        for entry in builtin.prompts(name)
    ]


def _check_alike(prompts: Sequence[Prompt], spec: str) -> None:
    for field in ("without", "reference"):
        if len({getattr(prompt, field) is None for prompt in prompts}) > 1:
            raise CapabilityError(
                "these built-in capabilities cannot be joined",
                where=spec,
                got=f'"{field}" in the prompts of some only',
                expected="instructions only, or only sets of the same kind",
                mend="score them as capabilities of their own",
            )


def _read_jsonl(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut texts at U+2028 and the like
    except (OSError, UnicodeDecodeError) as error:
        raise CapabilityError("the capability file cannot be read", where=path, got=error) from error
    numbers = [n for n, line in enumerate(lines, start=1) if line.strip()]
    prompts = [_parse(lines[n - 1], f"{path}, line {n}") for n in numbers]
    if not prompts:
        raise CapabilityError("the capability file is empty", where=path, expected="one JSON object a line")
    for field in ("without", "reference"):
        present = [getattr(prompt, field) is not None for prompt in prompts]
        if any(present) and not all(present):
            number = numbers[present.index(False)]
            raise CapabilityError(
                f'some prompts have "{field}" and some do not.',
                where=f"{path}, line {number}",
                expected="all or none",
                mend="split the file, or fill the field in",
            )
    return prompts


def _parse(line: str, where: str) -> Prompt:
    expected = '{"prompt": "…", "without": "…", "reference": "…"}, the last two optional'
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CapabilityError("a line is not JSON", where=where, got=str(error), expected=expected) from error
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise CapabilityError("a line has no prompt", where=where, got=line[:80], expected=expected)
    for field in ("without", "reference"):
        value = entry.get(field)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise CapabilityError(f'"{field}" is not a text.', where=where, got=repr(value), expected=expected)
    named = entry.get("instruction")
    return Prompt(
        prompt=entry["prompt"],
        without=entry.get("without"),
        reference=entry.get("reference"),
        instruction=named if isinstance(named, str) else None,
    )


@contextmanager
def rendering(
    where: object,
    *,
    kind: type[WpmergeError] = CapabilityError,
    mend: str = "correct it, in chat_template.jinja or tokenizer_config.json",
) -> Iterator[None]:
    """Turn what a chat template raises while it is applied into one clear error: it is a program that a model brings.

    Args:
        where: whose template it is.
        kind: of the error.
        mend: what to do about it.

    Raises:
        WpmergeError: of the given kind.
    """
    from jinja2 import TemplateError

    try:
        yield
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise kind("a chat template cannot be applied", where=where, got=reason_of(error), mend=mend) from error


_SAID = "what-a-user-says"
"""Stands for a user's words in a template that is taken apart."""


class Chat:
    """Turns what a user says into the tokens a model sees: through its chat template, or as ``Q: … A:`` without one.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_template = tokenizer.chat_template is not None

    def _rendered(self, prompt: str) -> str:
        """What the model reads before it replies."""
        if not self.has_template:
            return f"Q: {prompt}\nA:"
        with rendering(self.tokenizer.name_or_path):
            text: str = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
        return text

    def _tokens(self, text: str) -> list[int]:
        """A template writes its special tokens itself."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=not self.has_template)["input_ids"]
        return tokens

    def prompt_tokens(self, prompt: str) -> list[int]:
        """The prompt up to where the reply starts.

        Raises:
            CapabilityError: the chat template cannot be applied.
        """
        return self._tokens(self._rendered(prompt))

    def user_turn(self) -> tuple[list[int], str]:
        """The tokens before the words of a user, and the text that ends these: a token of its own, or some words.

        Raises:
            CapabilityError: the chat template cannot be applied, or does not put a user's words between others.
        """
        text = self._rendered(_SAID)
        before, _, after = text.partition(_SAID)
        head = self._tokens(before.rstrip(" "))
        if not before.strip() or not head or not after.strip() or _SAID in after:
            raise CapabilityError(
                "the chat template does not put what a user says between other words, once",
                where=self.tokenizer.name_or_path,
                got=text[:200],
            )
        own = [token for token in self.tokenizer.get_added_vocab() if after.lstrip().startswith(token)]
        lines = after.startswith("\n")  # words that end a turn begin a line, or they could be a user's
        return head, max(own, key=len) if own else "\n" * lines + after.strip()

    def reply_tokens(self, reply: str, *, limit: int) -> list[int]:
        """A reply and its end-of-text token; cut at ``limit`` tokens, since readouts need only its beginning."""
        text = reply if self.has_template else " " + reply
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return [*tokens, *([end] if end is not None else [])][:limit]


def reference_sequences(
    chat: Chat, capability: Capability, replies: Sequence[Sequence[int]] | None, *, limit: int
) -> tuple[list[list[int]], list[int]]:
    """Prompt and reference tokens, and where each reference starts.

    Args:
        chat: renders and tokenises.
        capability: its prompts, and its references unless ``replies`` are given.
        replies: the reply's tokens per prompt, for a capability without references.
        limit: longest reference, tokens.
    """
    sequences, starts = [], []
    for number, prompt in enumerate(capability.prompts):
        head = chat.prompt_tokens(prompt.prompt)
        if replies is not None:
            tail = list(replies[number])
        else:
            assert prompt.reference is not None, "a capability without references needs replies"
            tail = chat.reply_tokens(prompt.reference, limit=limit)
        sequences.append(head + tail)
        starts.append(len(head))
    return sequences, starts
