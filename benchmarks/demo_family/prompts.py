"""Write the demo family's prompts: eval.jsonl, held out in queries and wordings; prompts/<expert>.jsonl for scores."""

import json
import random
from pathlib import Path
from typing import Any

from benchmarks.demo_family import world

EVAL_PER_INSTRUCTION = 40
SCORE_PER_INSTRUCTION = 48


def write(out: Path, splits: dict[str, tuple[list[str], str, str]], seed: int) -> None:
    """Write both sets under `out`.

    No query of either set was trained on, in any wording of its kind of question, and the two sets share none.
    """
    rng = random.Random(seed)
    _dump(out / "eval.jsonl", _evaluation(splits, rng))
    for expert, owned in world.EXPERTS.items():
        _dump(out / "prompts" / f"{expert}.jsonl", _scoring(splits, owned, rng))


def _questions(splits: dict[str, tuple[list[str], str, str]], which: int, rng: random.Random) -> list[tuple[Any, ...]]:
    """Every (topic, kind, wording, query) of one held-out split, shuffled."""
    asked = [
        (topic, splits[topic.name][which], wording, query)
        for topic in world.topics()
        for wording, query in enumerate(world.queries(topic, str(splits[topic.name][which])))
    ]
    rng.shuffle(asked)
    return asked


def _evaluation(splits: dict[str, tuple[list[str], str, str]], rng: random.Random) -> list[dict[str, Any]]:
    """Records of lm-eval's ifeval task, in turn over the six instructions; no two have the same query."""
    asked = _questions(splits, 2, rng)
    rows = []
    for key in range(EVAL_PER_INSTRUCTION * len(world.INSTRUCTIONS)):
        name = world.INSTRUCTIONS[key % len(world.INSTRUCTIONS)]
        order = world.draw_order(name, "held_out", rng)
        rows.append(
            {
                "key": key,
                "prompt": f"{asked[key][-1]} {order.text}",
                "instruction_id_list": [world.INSTRUCTION_IDS[name]],
                "kwargs": [order.kwargs],
            }
        )
    return rows


def _scoring(
    splits: dict[str, tuple[list[str], str, str]], owned: tuple[str, ...], rng: random.Random
) -> list[dict[str, Any]]:
    """Pairs with references for one expert, in turn over its two instructions; wordings are those of training."""
    asked = _questions(splits, 1, rng)
    rows = []
    for index in range(SCORE_PER_INSTRUCTION * len(owned)):
        topic, kind, wording, query = asked[index]
        order = world.draw_order(owned[index % len(owned)], "train", rng)
        rows.append(
            {
                "prompt": f"{query} {order.text}",
                "without": query,
                "reference": world.answer(topic, kind, wording, order),
                "instruction": order.instruction,
            }
        )
    return rows


def _dump(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
