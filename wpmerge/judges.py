"""Test prompts, and whether a reply to one shows the skill: IFEval's checkers, a number, a JSON object."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from wpmerge.errors import EvaluationError
from wpmerge.ifeval import check_arguments, check_response, read_instructions, require_punkt
from wpmerge.jsonl import read_objects, require_text

JudgeName = Literal["ifeval", "number", "json", "none"]

# A few signs may stand between, such as a colon, markdown, a currency, a bracket; a minus belongs to the number.
_NUMBER = re.compile(
    r"answer is(?:[^\d\n−-]{0,3}|[\s:=*_~`$€£\"'“(\[\\]{0,10})([−-]?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE
)
_EXPECTED = (
    '{"prompt": "…"} and one of "instruction_id_list" with "kwargs", "answer" (a number or an object), "reference"'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TestPrompt:
    """One prompt of a test set.

    Attributes:
        prompt: what the user says.
        judge: "ifeval" (every instruction followed, strict), "number" (the last "answer is N"), "json" (the reply
            parses as the object), or "none": only log-probability is read.
        instructions: (instruction id, its checker's arguments), for "ifeval".
        answer: for "number" and "json".
        reference: a reply that shows the skill; None takes the expert's own.
    """

    __test__ = False  # the name is no test's

    prompt: str
    judge: JudgeName
    instructions: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    answer: Any = None
    reference: str | None = None


def judge(item: TestPrompt, reply: str) -> bool:
    """Whether a reply shows the skill.

    Raises:
        ValueError: the prompt is not judged.
    """
    if item.judge == "ifeval":
        return all(check_response(name, kwargs, item.prompt, reply) for name, kwargs in item.instructions)
    if item.judge in ("number", "json"):
        return gives_answer(reply, item.answer)
    raise ValueError(f"{item.prompt!r} is not judged")


def gives_answer(reply: str, answer: Any) -> bool:
    """Whether a reply gives the answer, by the answer's type: the last "answer is N" for a number; the whole reply read
    as JSON for an object, a list, a truth value or null, where 1 and 1.0 are the same, 1 and true are not; the reply
    itself, but for blanks around it, for a text."""
    if isinstance(answer, str):
        return reply.strip() == answer.strip()
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        said = _NUMBER.findall(reply)
        return bool(said) and Decimal(said[-1].replace(",", "").replace("−", "-")) == Decimal(str(answer))
    try:
        return _canonical(reply) == _canonical(json.dumps(answer))
    except (ValueError, RecursionError):  # no JSON, or brackets without end
        return False


def _canonical(text: str) -> str:
    """JSON in one spelling: 1 and 1.0 are the same, 1 and true are not."""
    return json.dumps(json.loads(text, parse_int=float), sort_keys=True)


def load_tests(path: Path) -> tuple[TestPrompt, ...]:
    """Read a test set: JSONL, one prompt a line; all are judged, or none.

    Raises:
        EvaluationError: the file cannot be read or is empty, or a line is malformed, with its number.
    """
    found = [_parse(entry, where) for entry, where in _entries(path)]
    judged = [item.judge != "none" for item in found]
    if any(judged) and not all(judged):
        raise EvaluationError(
            "some test prompts are judged and some are not",
            where=path,
            got=f"{sum(judged)} of {len(judged)}",
            expected="all or none",
            mend="split the file, or fill the answers in",
        )
    return tuple(found)


def load_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a JSONL file, whatever else its lines hold.

    Raises:
        EvaluationError: the file cannot be read or is empty, or a line is malformed, with its number.
    """
    return tuple(str(entry["prompt"]) for entry, _ in _entries(path))


def hash_of_tests(items: tuple[TestPrompt, ...]) -> str:
    """SHA-256 of a test set, in order."""
    rows = [[i.prompt, i.judge, [[n, dict(k)] for n, k in i.instructions], i.answer, i.reference] for i in items]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _entries(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Each line's object, which has a prompt, and where it stands."""
    found = read_objects(path, expected=_EXPECTED)
    for entry, where in found:
        require_text(entry, "prompt", where=where, expected=_EXPECTED)
    return found


def _parse(entry: dict[str, Any], where: str) -> TestPrompt:
    reference = entry.get("reference")
    if reference is not None and (not isinstance(reference, str) or not reference.strip()):
        raise EvaluationError("a reference is not a text", where=where, got=repr(reference)[:80], expected=_EXPECTED)
    given = [key for key in ("instruction_id_list", "answer") if entry.get(key) is not None]
    if len(given) > 1 or not (given or reference):
        raise EvaluationError(
            "a line says no way of judging the reply, or two",
            where=where,
            got=json.dumps(entry)[:80],
            expected=_EXPECTED,
        )
    prompt = str(entry["prompt"])
    if "answer" in given:
        return TestPrompt(prompt=prompt, reference=reference, **_answer(entry["answer"], where))
    if given:
        instructions = _instructions(entry, where)
        return TestPrompt(prompt=prompt, reference=reference, judge="ifeval", instructions=instructions)
    return TestPrompt(prompt=prompt, reference=reference, judge="none")


def _answer(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, bool) or not isinstance(value, int | float | dict):
        raise EvaluationError("an answer is neither a number nor an object", where=where, got=repr(value)[:80])
    return {"judge": "json" if isinstance(value, dict) else "number", "answer": value}


def _instructions(entry: Mapping[str, Any], where: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    pairs = read_instructions(entry["instruction_id_list"], entry.get("kwargs"), where=where)
    require_punkt({name for name, _ in pairs}, where=where)
    for name, kwargs in pairs:
        check_arguments(name, kwargs, entry["prompt"], where=where)
    return tuple((name, {key: value for key, value in each.items() if value is not None}) for name, each in pairs)
