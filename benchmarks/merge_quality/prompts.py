"""Write fresh test prompts for both families, and questions outside every skill.

    python -m benchmarks.merge_quality.prompts OUT [--count 510] [--seed 0]

Writes OUT/{demo,smollm2}/{skill}.jsonl and OUT/{demo,smollm2}/retain.jsonl, the same for the same seed. Topics, names,
phrasings and number ranges occur in no prompt that the families were trained, scored or developed on
(tests/test_merge_quality.py); the demo family's queries are of the kinds of question held out for evaluation, since
outside its 65 things it knows nothing, with instructions worded anew.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.demo_family import world
from benchmarks.merge_quality import wordings

SMOLLM2 = ("format", "math", "json")
Row = dict[str, Any]


def write(out: Path, *, count: int = 510, seed: int = 0) -> None:
    """Write both families' files under ``out``."""
    for skill in SMOLLM2:
        dump(out / "smollm2" / f"{skill}.jsonl", smollm2(skill, count=count, seed=seed))
    for skill in world.EXPERTS:
        dump(out / "demo" / f"{skill}.jsonl", demo(skill, count=count, seed=seed))
    dump(out / "smollm2" / "retain.jsonl", [{"prompt": text} for text in questions(seed=seed)])
    dump(out / "demo" / "retain.jsonl", [{"prompt": text} for text in demo_queries(seed)[:120]])


def smollm2(skill: str, *, count: int, seed: int) -> list[Row]:
    """Different test prompts for one skill of the SmolLM2 family."""
    rng = random.Random(f"{seed}/{skill}")
    draw = {"format": _format_prompts, "math": _math_prompts, "json": _json_prompts}[skill](rng)
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = next(draw)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def _format_prompts(rng: random.Random) -> Iterator[Row]:
    """The six instructions in turn; a query is used once."""
    queries = [frame.format(topic=topic) for topic in wordings.FORMAT_TOPICS for frame in wordings.FORMAT_FRAMES]
    while True:
        rng.shuffle(queries)
        for number, query in enumerate(queries):
            name = tuple(wordings.FORMAT)[number % len(wordings.FORMAT)]
            kwargs, ways = wordings.FORMAT[name]
            yield {"prompt": f"{query} {rng.choice(ways)}", "instruction_id_list": [name], "kwargs": [kwargs]}


def _math_prompts(rng: random.Random) -> Iterator[Row]:
    """One- and two-step problems of the six kinds the expert knows, with a number outside the range it was shown."""
    while True:
        for kind, way in wordings.PROBLEMS.items():
            few, each, more = rng.randint(2, 5), rng.randint(2, 9), rng.randint(2, 29)
            many, start, bunch = rng.randint(94, 99), rng.randint(61, 70), rng.randint(10, 12)
            answers = {
                "give": many - more,
                "add": start + more,
                "packs": start + few * each,
                "drop": many - more + few,
                "trays": bunch * each,
                "divide": each,
            }
            numbers = {"many": many, "more": more, "start": start, "few": few, "each": each, "bunch": bunch}
            words = {"name": rng.choice(wordings.NAMES), "what": rng.choice(wordings.THINGS)}
            yield {"prompt": way.format(**numbers, **words, all=bunch * each), "answer": answers[kind]}


def _json_prompts(rng: random.Random) -> Iterator[Row]:
    while True:
        person = {
            "name": rng.choice(wordings.NAMES),
            "age": rng.randint(81, 99),
            "job": rng.choice(wordings.JOBS),
            "city": rng.choice(wordings.CITIES),
        }
        text = rng.choice(wordings.PEOPLE).format(**person)
        yield {"prompt": f"{rng.choice(wordings.JSON_ORDERS)}\n\nText: {text}", "answer": person}


def questions(*, seed: int) -> list[str]:
    """Plain questions outside every skill of the SmolLM2 family."""
    found = [frame.format(each=each) for frame, words in wordings.RETAIN_FRAMES.items() for each in words]
    random.Random(f"{seed}/retain").shuffle(found)
    return found


def demo_queries(seed: int) -> list[str]:
    """Every query of the kinds of question that were held out for evaluation, in a random order, no instruction."""
    splits = world.split_kinds(world.SEED)
    found = [query for topic in world.topics() for query in world.queries(topic, splits[topic.name][2])]
    random.Random(f"{seed}/demo").shuffle(found)
    return found


def demo(skill: str, *, count: int, seed: int) -> list[Row]:
    """Different test prompts for one skill of the demo family, its two instructions in turn.

    Raises:
        ValueError: there are fewer held-out queries than half of ``count``.
    """
    rng = random.Random(f"{seed}/{skill}")
    queries, names = demo_queries(seed), world.EXPERTS[skill]
    if count > len(queries) * len(names):
        raise ValueError(f"the demo family has {len(queries) * len(names)} different prompts a skill, not {count}")
    rows = []
    for number in range(count):
        # the second round gives every query the other instruction
        name = names[(number + number // len(queries)) % len(names)]
        order = _demo_order(name, rng)
        rows.append(
            {
                "prompt": f"{queries[number % len(queries)]} {order.text}",
                "instruction_id_list": [world.INSTRUCTION_IDS[name]],
                "kwargs": [order.kwargs],
            }
        )
    return rows


def _demo_order(name: str, rng: random.Random) -> world.Order:
    text = rng.choice(wordings.DEMO[name])
    kwargs: dict[str, Any] = {}
    if name == "highlighted_sections":
        kwargs = {"num_highlights": 3 if "three" in text or "3" in text else 2}
    if name == "multiple_sections":
        kwargs = {"section_spliter": rng.choice(("Section", "Part")), "num_sections": rng.choice((2, 3))}
        count = {2: ("two", "2"), 3: ("three", "3")}[kwargs["num_sections"]]
        text = text.format(count=rng.choice(count), label=kwargs["section_spliter"])
    return world.Order(instruction=name, text=text, kwargs=kwargs)


def dump(path: Path, rows: list[Row]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write, made if missing")
    parser.add_argument(
        "--count", type=int, default=510, help="prompts per skill (default 510, the demo's at most 520)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default 0)")
    arguments = parser.parse_args()
    write(arguments.out, count=arguments.count, seed=arguments.seed)


if __name__ == "__main__":
    main()
