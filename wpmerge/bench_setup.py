"""What a benchmark is made of before anything is merged: strategies, subsets, prompts by seed."""

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from wpmerge.calibration import HeldOutReading
from wpmerge.capability import Capability, reference_sequences
from wpmerge.errors import CapabilityError, EvaluationError
from wpmerge.judges import TestPrompt, load_tests
from wpmerge.models import Family, continuations
from wpmerge.options import one_of
from wpmerge.pieces import Pieces
from wpmerge.scores import Scores
from wpmerge.strategies import OURS, RIVALS, SAME_AS_RIVALS
from wpmerge.tuning import read_references

logger = logging.getLogger(__name__)

CONTROLS = ("shuffled", "norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What ``wpmerge bench`` may be told.

    Attributes:
        strategies: names; empty for every rival, every rule of ours that is no rival's twin, and its controls.
        subsets: experts merged together; empty for every pair and the whole set.
        seeds: each has tuning prompts, draws and test prompts of its own.
        only_seeds: of ``seeds`` those to run now, so that machines can share the work; empty for all.
        evaluations: merges that each strategy may run on the tuning prompts, per subset and seed.
        tune: tuning prompts per skill and seed.
        tests: test prompts per skill over all seeds; None for all in the file.
        longest: tokens of a reply, and of a reference.
        generate: judge generated replies; otherwise log-probabilities alone.
        batch_size: prompts that are generated together.
        finalists: how many rivals, and how many rules of ours, go on to the seeds after the first: those that kept most
            on its tuning prompts, by mean and by minimum; ``uniform``, ``scaled`` and ``fuse:refine-expert``
            always, and a rule's controls with it. None for all. No test prompt has a say in it.
        label: what every line of results bears, such as a commit.
    """

    strategies: tuple[str, ...] = ()
    subsets: tuple[tuple[str, ...], ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    only_seeds: tuple[int, ...] = ()
    evaluations: int = 24
    tune: int = 16
    tests: int | None = None
    longest: int = 96
    generate: bool = True
    batch_size: int = 48
    finalists: int | None = None
    label: str = ""

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise EvaluationError("seeds must be different, and at least one", got=self.seeds)
        if unknown := set(self.only_seeds) - set(self.seeds):
            raise EvaluationError(
                "a seed to run now is none of the benchmark's seeds", got=sorted(unknown)[0], expected=self.seeds
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningPool:
    """One skill's prompts for tuning: tokens, and where each reference starts."""

    sequences: Sequence[Sequence[int]]
    starts: Sequence[int]


def strategy_names(asked: Sequence[str]) -> tuple[str, ...]:
    """The strategies to run, a rule before its controls.

    Raises:
        WpmergeError: an unknown name; names the nearest.
    """
    known = [*RIVALS]
    for rule in OURS:
        known += [rule, *(f"{rule}/{control}" for control in CONTROLS)]
    default = [name for name in known if name.split("/")[0] not in SAME_AS_RIVALS]
    chosen: list[str] = []
    for name in asked or default:
        one_of("--strategy", name, known)
        chosen += [name.split("/")[0], name]
    return tuple(dict.fromkeys(chosen))


def check_subsets(asked: Sequence[Sequence[str]], experts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The subsets of experts, the largest first, each in the order of the scores.

    Raises:
        EvaluationError: an unknown expert, one named twice, or fewer than two.
    """
    if not asked:
        if len(experts) < 2:
            raise EvaluationError("a benchmark of merges takes at least two experts", got=", ".join(experts))
        whole = [tuple(experts)] if len(experts) > 2 else []
        return (*whole, *combinations(experts, 2))
    for names in asked:
        if unknown := [name for name in names if name not in experts]:
            raise EvaluationError("--subset names an unknown expert", got=unknown[0], expected=", ".join(experts))
        if len(set(names)) != len(names) or len(names) < 2:
            raise EvaluationError("--subset takes at least two different experts", got="+".join(names))
    return tuple(dict.fromkeys(tuple(name for name in experts if name in names) for names in asked))


def check_names(experts: Sequence[str], *, tests: Mapping[str, Path], prompts: Mapping[str, Path]) -> None:
    """Refuse files of what is no expert.

    Raises:
        EvaluationError: names the first.
    """
    for option, given in (("--test", tests), ("--prompts", prompts)):
        if unknown := [name for name in given if name not in experts]:
            raise EvaluationError(f"{option} names no expert", got=unknown[0], expected=", ".join(experts))


def read_tests(tests: Mapping[str, Path], skills: Sequence[str]) -> dict[str, tuple[TestPrompt, ...]]:
    """The test prompts of every skill that is merged.

    Raises:
        EvaluationError: a skill without test prompts, or a malformed file.
    """
    if missing := [name for name in skills if name not in tests]:
        raise EvaluationError(
            "a skill has no test prompts", got=missing[0], mend=f"give them with --test {missing[0]}=FILE.jsonl"
        )
    return {name: load_tests(tests[name]) for name in skills}


def check_tests(
    items: Mapping[str, Sequence[TestPrompt]],
    outside: Sequence[str],
    scores: Scores,
    more: Mapping[str, Capability],
    settings: BenchSettings,
) -> None:
    """Refuse test prompts that something was chosen on, and fewer than there are seeds; say where tuning has too few.

    Args:
        items: test prompts by skill.
        outside: questions outside every skill, that the merges are tested on.
        scores: what they were taken on, and what they held out, retain sets included.
        more: further prompts to tune on.
        settings: seeds, and how many prompts each tunes on.

    Raises:
        EvaluationError: names the first prompt.
    """
    known = {prompt for record in scores.capabilities.values() for prompt in (*record.scored, *record.held_out.prompts)}
    known |= {prompt.prompt for capability in more.values() for prompt in capability.prompts}
    tested = {**{name: [item.prompt for item in each] for name, each in items.items()}, "--retain": list(outside)}
    for name, prompts in tested.items():
        if seen := next((prompt for prompt in prompts if prompt in known), None):
            raise EvaluationError(
                "a test prompt was scored or is kept for tuning",
                where=name,
                got=seen[:80],
                mend="take it out of the test file, or out of --prompts",
            )
    for name, each in items.items():
        if min(len(each), settings.tests or len(each)) < len(settings.seeds):
            raise EvaluationError(
                "every seed needs a test prompt of its own",
                where=name,
                got=f"{min(len(each), settings.tests or len(each))} prompts for {len(settings.seeds)} seeds",
                mend="give more test prompts, or fewer seeds (--seed)",
            )
        pool = len(scores.capabilities[name].held_out.prompts) + len(more[name].prompts if name in more else ())
        if pool < 2 * settings.tune:
            logger.warning(
                "%s: %d prompts to tune on for draws of %d: every seed tunes on much the same (--prompts gives more)",
                name,
                pool,
                settings.tune,
            )


def split_tests(items: Sequence[TestPrompt], settings: BenchSettings) -> dict[int, tuple[TestPrompt, ...]]:
    """Seed → its test prompts: disjoint, together all of them (or the first ``settings.tests`` of a fixed shuffle)."""
    order = list(range(len(items)))
    random.Random(0).shuffle(order)
    kept = order[: settings.tests]
    count = len(settings.seeds)
    return {seed: tuple(items[i] for i in kept[place::count]) for place, seed in enumerate(settings.seeds)}


def tuning_pool(
    family: Family, scores: Scores, name: str, extra: Capability | None, pieces: Pieces, *, limit: int
) -> TuningPool:
    """A skill's held-out prompts in the scores, and more from a file; none that a score was taken on.

    Args:
        family: replies where a file has no references.
        scores: hold held-out prompts with their references.
        name: the skill.
        extra: more prompts; None for none.
        pieces: keeps replies.
        limit: longest reference, tokens.

    Raises:
        CapabilityError: all of them are in the scores already.
    """
    record = scores.capabilities[name]
    sequences, starts = [list(each) for each in record.held_out.sequences], list(record.held_out.starts)
    if extra is not None:
        known = {*record.scored, *record.held_out.prompts}
        fresh = tuple(prompt for prompt in extra.prompts if prompt.prompt not in known)
        if not fresh:
            raise CapabilityError(
                "no prompt of the file is new", where=extra.source, got="all are in the scores already"
            )
        capability = Capability(name=name, source=extra.source, prompts=fresh)
        replies = None
        if not capability.has_references:
            texts = [prompt.prompt for prompt in fresh]
            replies = pieces.record(
                f"tuning-{name}", lambda: {"replies": continuations(family, name, texts, tokens=limit)}
            )["replies"]
        more, more_starts = reference_sequences(family.chat, capability, replies, limit=limit)
        sequences, starts = [*sequences, *more], [*starts, *more_starts]
    return TuningPool(sequences=sequences, starts=starts)


def tuning_readings(
    family: Family, pools: Mapping[str, TuningPool], settings: BenchSettings, seed: int
) -> dict[str, HeldOutReading]:
    """Skill → this seed's draw of tuning prompts, with what base and expert read there.

    Raises:
        CapabilityError: an expert is no better than the base on them.
    """
    readings = {}
    for name, pool in pools.items():
        draw = random.Random(f"{seed}/{name}").sample(range(len(pool.starts)), min(settings.tune, len(pool.starts)))
        sequences, starts = [pool.sequences[i] for i in draw], [pool.starts[i] for i in draw]
        prompts, mend = f"tuning prompts of seed {seed}", "use more of them (--tune), or other prompts (--prompts)"
        readings[name] = read_references(family, name, sequences, starts, prompts=prompts, mend=mend)
    return readings


def text_hash(value: Any) -> str:
    """SHA-256 of a JSON value, short."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:16]
