"""What a model does on the test prompts of a benchmark, and the reference replies that it is read on."""

from collections.abc import Mapping, Sequence
from typing import Any

from wpmerge.bench_results import SkillResult
from wpmerge.bench_setup import BenchSettings, split_tests
from wpmerge.judges import TestPrompt, judge
from wpmerge.models import Family, end_tokens, generation_model
from wpmerge.pieces import Pieces
from wpmerge.replies import Decoding, read_and_reply
from wpmerge.weights import WeightSource

RETAIN_TOKENS = 32
"""Longest reply of the base to a retain prompt: enough to tell whether the merge still speaks as the base does."""


class Tester:
    """Test prompts by skill and seed, and the experts' replies to them, made when first needed and kept.

    Args:
        family: the models; its chat template renders prompts.
        items: skill → all its test prompts.
        outside: prompts outside every skill.
        settings: seeds, lengths, and whether replies are generated.
        pieces: keeps replies.
    """

    def __init__(
        self,
        family: Family,
        items: Mapping[str, tuple[TestPrompt, ...]],
        outside: tuple[str, ...],
        settings: BenchSettings,
        pieces: Pieces,
    ) -> None:
        self.family, self.outside, self.settings, self.pieces = family, outside, settings, pieces
        self.tests = {name: split_tests(each, settings) for name, each in items.items()}

    def test(self, source: WeightSource, seed: int, skills: Sequence[str]) -> dict[str, SkillResult]:
        """What a model does on a seed's test prompts."""
        model = generation_model(self.family.engine, source)
        found = {}
        for skill in skills:
            items = self.tests[skill][seed]
            heads = [self.family.chat.prompt_tokens(item.prompt) for item in items]
            drafts = self._references(skill, seed, items, heads)
            judged = self.settings.generate and items[0].judge != "none"
            decoding = self._decoding(skill, self.settings.longest if judged else 0)
            replies = read_and_reply(model, heads, drafts, decoding)
            correct = ""
            if judged:
                texts = [self._text(reply.tokens) for reply in replies]
                correct = "".join(str(int(judge(item, text))) for item, text in zip(items, texts, strict=True))
            found[skill] = SkillResult(
                correct=correct,
                logprob=tuple(reply.logprob for reply in replies),
                unfinished=sum(not reply.finished for reply in replies) if judged else 0,
            )
        return found

    def _references(
        self, skill: str, seed: int, items: Sequence[TestPrompt], heads: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """A reference per prompt: as given, or the expert's own greedy reply, made once and kept."""
        longest = self.settings.longest
        given = [
            None if item.reference is None else self.family.chat.reply_tokens(item.reference, limit=longest)
            for item in items
        ]
        lacking = [i for i, tokens in enumerate(given) if tokens is None]
        if not lacking:
            return [tokens for tokens in given if tokens is not None]

        def write() -> dict[str, Any]:
            return {"replies": self._own_replies(skill, [heads[i] for i in lacking], longest)}

        replies = dict(zip(lacking, self.pieces.record(f"{skill}-{seed}", write)["replies"], strict=True))
        return [tokens if tokens is not None else replies[i] for i, tokens in enumerate(given)]

    def _own_replies(self, expert: str, heads: Sequence[Sequence[int]], longest: int) -> list[list[int]]:
        """A model's greedy replies; the base's under ``""``."""
        model = generation_model(self.family.engine, self.family.weights[expert])
        decoding = self._decoding(expert, longest)
        found = read_and_reply(model, heads, [[] for _ in heads], decoding)
        return [list(reply.tokens) for reply in found]

    def retain(self, source: WeightSource, seed: int) -> tuple[float, ...]:
        """Log-probability of the base's own replies to a seed's share of the prompts outside every skill."""
        place = self.settings.seeds.index(seed)
        share = self.outside[place :: len(self.settings.seeds)]
        if not share:
            return ()
        heads = [self.family.chat.prompt_tokens(prompt) for prompt in share]
        longest = min(RETAIN_TOKENS, self.settings.longest)

        def write() -> dict[str, Any]:
            return {"replies": self._own_replies("", heads, longest)}

        own = self.pieces.record(f"@base-{seed}", write)["replies"]
        model = generation_model(self.family.engine, source)
        return tuple(reply.logprob for reply in read_and_reply(model, heads, own, self._decoding("", 0)))

    def _decoding(self, expert: str, longest: int) -> Decoding:
        tokenizer = self.family.chat.tokenizer
        names = [expert] if expert else list(self.family.experts)
        ends = set[int]().union(*(end_tokens(self.family, name) for name in names))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
        return Decoding(longest=longest, ends=frozenset(ends), pad=pad, batch_size=self.settings.batch_size)

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self.family.chat.tokenizer.decode(tokens, skip_special_tokens=True)
        return text
