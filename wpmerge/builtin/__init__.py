"""The capabilities that come with the package: prompts for six of IFEval's verifiable instructions.

Each capability is one JSON file beside this module: the id of the instruction in lm-eval's ifeval task, the keyword
arguments of its checker, and several wordings. The queries are common to all of them. No prompt is one of IFEval's.
"""

import json
from importlib.resources import files
from typing import Any

_QUERIES = "queries"


def names() -> list[str]:
    """Return the names of the built-in capabilities, sorted."""
    stems = (entry.name.removesuffix(".json") for entry in files(__name__).iterdir() if entry.name.endswith(".json"))
    return sorted(stem for stem in stems if stem != _QUERIES)


def prompts(name: str) -> list[dict[str, Any]]:
    """Return every prompt of one built-in capability.

    Args:
        name: One of `names()`.

    Returns:
        One dict per (query, wording): `prompt` (the query, a space, the instruction), `without` (the query alone),
        `instruction_id` and `kwargs` (what lm-eval's checker of that instruction takes). The order is fixed and
        diagonal: any n neighbours, n up to the number of queries, have n different queries and take the wordings in
        turn.

    Raises:
        KeyError: If there is no such capability.
    """
    if name not in names():
        raise KeyError(name)
    capability = _read(name)
    queries = _read(_QUERIES)
    wordings = capability["phrasings"]
    return [
        {
            "prompt": f"{query} {wordings[(index + turn) % len(wordings)]}",
            "without": query,
            "instruction_id": capability["instruction_id"],
            "kwargs": dict(capability["kwargs"]),
        }
        for turn in range(len(wordings))
        for index, query in enumerate(queries)
    ]


def _read(stem: str) -> Any:
    return json.loads((files(__name__) / f"{stem}.json").read_text(encoding="utf-8"))
