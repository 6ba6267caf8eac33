"""The results of a benchmark on disk: one JSON line per finished strategy, subset and seed, so that a rerun goes on."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wpmerge.errors import EvaluationError

logger = logging.getLogger(__name__)

BASE_MODEL, EXPERT_MODEL = "@base", "@expert"
"""Strategies of the lines that hold what a base, or an expert on its own skill, did on the test prompts."""

Key = tuple[tuple[str, ...], str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillResult:
    """What one model did on one skill's test prompts of one seed, in their order.

    Attributes:
        correct: a "1" or "0" per prompt; empty where nothing was judged.
        logprob: of the reference replies, nats per token.
        unfinished: replies that came to no end within the length allowed.
    """

    correct: str = ""
    logprob: tuple[float, ...] = ()
    unfinished: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One finished piece of work.

    Attributes:
        subset: the experts that were merged, in order; for an expert's own line the expert; empty for the base.
        strategy: its name, or :data:`BASE_MODEL` or :data:`EXPERT_MODEL`.
        seed: of prompt split, draws, and the test prompts it stands for.
        skills: skill → what was read.
        retain: log-probability of the base's own replies to the retain prompts, nats per token.
        parameters: what tuning chose.
        tuned: skill → retention on the tuning prompts.
        evaluations: merges run on the tuning prompts.
        seconds: of tuning, and of the test.
        made_by: package → version; the machine, torch's threads, and the benchmark's label.
    """

    subset: tuple[str, ...]
    strategy: str
    seed: int
    skills: Mapping[str, SkillResult]
    retain: tuple[float, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, float] = field(default_factory=dict)
    evaluations: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    made_by: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What a rerun would skip."""
        return (self.subset, self.strategy, self.seed)


class ResultFile:
    """``results.jsonl``. A line is on disk before :meth:`append` returns; one that a kill cut short is dropped.

    Args:
        path: made where it is missing.

    Raises:
        EvaluationError: a line that is no result, with its number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[Key, Record] = {}
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            logger.warning("%s: the last line was cut short by an interruption, and is dropped", path)
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            record = _record(line, f"{path}, line {number}")
            self.records[record.key] = record  # a later line replaces an earlier one

    def append(self, record: Record) -> None:
        """Add a finished piece of work."""
        written = _line(record).encode()
        with self.path.open("ab") as file:
            file.write(written + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record.key] = _record(written, str(self.path))  # as a rerun reads it: to the digits that are kept

    def find(self, subset: Sequence[str], strategy: str, seed: int) -> Record | None:
        """A finished piece of work; None if it is still to be done."""
        return self.records.get((tuple(subset), strategy, seed))


def _line(record: Record) -> str:
    skills = {
        name: {
            "correct": result.correct,
            "logprob": [round(value, 5) for value in result.logprob],
            "unfinished": result.unfinished,
        }
        for name, result in record.skills.items()
    }
    return json.dumps(
        {
            "subset": list(record.subset),
            "strategy": record.strategy,
            "seed": record.seed,
            "parameters": dict(record.parameters),
            "tuned": {name: round(value, 5) for name, value in record.tuned.items()},
            "evaluations": record.evaluations,
            "seconds": {name: round(value, 2) for name, value in record.seconds.items()},
            "made_by": dict(record.made_by),
            "skills": skills,
            "retain": [round(value, 5) for value in record.retain],
        }
    )


def _record(line: bytes, where: str) -> Record:
    try:
        entry = json.loads(line)
        skills = {
            name: SkillResult(
                correct=each["correct"], logprob=tuple(each["logprob"]), unfinished=int(each["unfinished"])
            )
            for name, each in entry.pop("skills").items()
        }
        for name, each in skills.items():
            if each.correct and len(each.correct) != len(each.logprob):
                raise ValueError(f"{name}: {len(each.correct)} judged replies, {len(each.logprob)} read")
        subset, retain = tuple(entry.pop("subset")), tuple(entry.pop("retain"))
        return Record(subset=subset, retain=retain, skills=skills, **entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            "a line is no result of wpmerge bench",
            where=where,
            got=f"{type(error).__name__}: {error}",
            mend="remove the line; what it held is done again",
        ) from error
