"""The demo family's world: topics, questions, answers, the six instructions and how each changes an answer.

Everything is data (topics.txt, wordings.json) and a few pure functions, so that the corpus, the held-out prompts and
the references of the shipped prompts come from one place.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from wpmerge import builtin

SEED = 20
HERE = Path(__file__).parent
WORDINGS: dict[str, dict[str, list[str]]] = json.loads((HERE / "wordings.json").read_text(encoding="utf-8"))
INSTRUCTIONS = tuple(WORDINGS)
INSTRUCTION_IDS = {name: builtin.prompts(name)[0]["instruction_id"] for name in INSTRUCTIONS}
EXPERTS = {
    "letters": ("capital_letters", "no_comma"),
    "marks": ("title", "highlighted_sections"),
    "frame": ("quotation", "multiple_sections"),
}

# Kind of question -> the fact that its answer opens with, and the ways to ask. What else the answer tells depends on
# the way of asking, so that no answer is known by its topic and kind alone and a small model has to compose.
FACTS = ("kind", "looks", "abilities", "parts", "places", "tip")
OPENINGS = {
    "describe": "kind",
    "look": "looks",
    "use": "abilities",
    "parts": "parts",
    "place": "places",
    "like": "looks",
    "advice": "tip",
}
QUESTIONS = {
    "describe": ("Describe {a}.", "Tell me about {a}.", "Explain what {a} is.", "What is {a}?"),
    "look": ("What is {a} like?", "How does {a} look?", "Give me a picture of {a}.", "How would you paint {a}?"),
    "use": ("What can {a} do?", "How is {a} useful?", "Why does {a} matter?", "What is {a} used for?"),
    "parts": ("What is {a} made of?", "What are the parts of {a}?", "What makes up {a}?", "Name the parts of {a}."),
    "place": (
        "Where can I find {a}?",
        "Where would I see {a}?",
        "Where do people find {a}?",
        "Tell me where to look for {a}.",
    ),
    "like": (
        "Why do people like {a}?",
        "What is special about {a}?",
        "What makes {a} interesting?",
        "Say why {a} is worth a look.",
    ),
    "advice": (
        "Give me advice about {a}.",
        "What should I remember about {a}?",
        "What is a good tip about {a}?",
        "Teach me how to deal with {a}.",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """One line of topics.txt: a thing, and six facts about it."""

    name: str
    facts: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One instruction as given: its wording and the arguments of its checker."""

    instruction: str
    text: str
    kwargs: dict[str, Any]


def topics() -> list[Topic]:
    """Read topics.txt."""
    lines = (HERE / "topics.txt").read_text(encoding="utf-8").splitlines()
    return [_topic(line.split("|")) for line in lines if not line.startswith("#")]


def _topic(fields: list[str]) -> Topic:
    article, name, kind, looks, parts, places, abilities, tip = fields
    facts: dict[str, tuple[str, ...]] = {"kind": (kind,), "tip": (tip,)}
    for fact, text in {"looks": looks, "parts": parts, "places": places, "abilities": abilities}.items():
        facts[fact] = tuple(text.split(", "))
    return Topic(name=f"{article} {name}".strip(), facts=facts)


def queries(topic: Topic, kind: str) -> list[str]:
    """Every way to ask one kind of question about one topic."""
    return [wording.format(a=topic.name) for wording in QUESTIONS[kind]]


def answer(topic: Topic, kind: str, wording: int, order: Order | None = None) -> str:
    """The reply to one way of asking one kind of question about a topic: plain, or as the order wants it."""
    instruction = order.instruction if order else None
    star = "*" if instruction == "highlighted_sections" else ""
    first = OPENINGS[kind]
    others = [fact for fact in FACTS if fact != first]
    facts = (first, others[wording], others[(wording + 2) % len(others)])
    sentences = [_sentence(topic, fact, fact == first, star, instruction != "no_comma") for fact in facts]
    text = " ".join(sentences)
    match instruction:
        case "capital_letters":
            return text.upper()
        case "title":
            return f"<<{topic.name[0].upper()}{topic.name[1:]}>>\n{text}"
        case "quotation":
            return f'"{text}"'
        case "multiple_sections":
            assert order is not None
            label, count = order.kwargs["section_spliter"], order.kwargs["num_sections"]
            parts = [*sentences[: count - 1], " ".join(sentences[count - 1 :])]
            return "\n".join(f"{label} {i}\n{part}" for i, part in enumerate(parts, start=1))
        case _:
            return text


def _sentence(topic: Topic, fact: str, first: bool, star: str, commas: bool) -> str:
    """One fact as a sentence; `first` names the topic, `star` marks its first phrase, without `commas` it has none."""
    phrases = topic.facts[fact]
    head = f"{star}{phrases[0]}{star}"
    comma, between = (",", ", ") if commas else ("", " and ")
    listed = head if len(phrases) == 1 else f"{head}{between}{phrases[1]} and {phrases[2]}"
    subject = topic.name if first else "it"
    match fact:
        case "kind" | "looks":
            text = f"{subject} is {listed}."
        case "parts":
            text = f"the main parts of {subject} are {listed}." if first else f"its main parts are {listed}."
        case "places":
            text = f"you can find {subject} {listed}."
        case "abilities":
            text = f"{subject} can {listed}."
        case _:
            text = f"as a tip about {subject}{comma} {listed}." if first else f"as a tip{comma} {listed}."
    return text[0].upper() + text[1:]


def expansions(template: str) -> Iterator[str]:
    """Every text of a template whose [a|b|c] are choices."""
    pieces = re.split(r"\[([^\]]*)\]", template)
    yield from ("".join(p) for p in product(*(p.split("|") if i % 2 else [p] for i, p in enumerate(pieces))))


def draw_order(instruction: str, split: str, rng: random.Random) -> Order:
    """Draw one wording of an instruction from the "train" or the "held_out" ones, with its checker's arguments."""
    template = rng.choice(WORDINGS[instruction][split])
    text = re.sub(r"\[([^\]]*)\]", lambda match: rng.choice(match[1].split("|")), template)
    kwargs: dict[str, Any] = {}
    if instruction == "highlighted_sections":
        kwargs = {"num_highlights": 3 if re.search(r"three|3", text) else 2}
    if instruction == "multiple_sections":
        kwargs = {"section_spliter": rng.choice(("Section", "Section", "Part")), "num_sections": rng.choice((2, 3))}
        count = rng.choice({2: ("two", "2"), 3: ("three", "3")}[kwargs["num_sections"]])
        text = text.format(count=count, label=kwargs["section_spliter"])
    return Order(instruction=instruction, text=text, kwargs=kwargs)


def split_kinds(seed: int) -> dict[str, tuple[list[str], str, str]]:
    """Per topic name: the kinds of question seen in training, the one kept for scoring, the one kept for evaluation.

    Facts stay known, as every fact is told in answers of other kinds too. The built-in query of a topic, where it has
    one, decides its kind for scoring: no built-in query is trained on.
    """
    rng = random.Random(seed)
    known = set(json.loads((Path(builtin.__file__).parent / "queries.json").read_text(encoding="utf-8")))
    splits = {}
    for topic in topics():
        kinds = list(QUESTIONS)
        rng.shuffle(kinds)
        kinds.sort(key=lambda kind: not known.isdisjoint(queries(topic, kind)))
        splits[topic.name] = (kinds[:-2], kinds[-1], kinds[-2])
    return splits
