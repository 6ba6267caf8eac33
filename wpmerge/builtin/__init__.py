"""The capabilities that come with the package: IFEval's 25 verifiable instructions, and four sets of tasks.

Each capability is one JSON file beside this module. No prompt is one of IFEval's.

An instruction's file holds `instruction_id` (its id in lm-eval's ifeval task), `kwargs` (the arguments of its checker),
`phrasings` (several wordings) and, where the arguments vary, `variants`: each adds `kwargs` of its own and may `fill`
words that only the wording needs, such as a language's name. A wording names the arguments in braces. A text among the
kwargs may hold `{query}`. The queries are common to all in queries.json, unless `queries` names another file. Where a
checker can ask for more or for less, one file keeps to one of the two: a contrast over both would cancel itself.

The sets `math`, `code`, `json_output` and `knowledge` are no instructions. Their `queries` are objects, whose values
the wordings name in braces:

* math: `query` (a word problem), `working` (the calculation), `answer` (a number; a right reply says "answer is N").
* code: `query` (what the function does), `signature`, `function` (the name that a reply must define), `examples`: what
  the function gives for a list of positional `arguments`.
* json_output: `query` (a text), `fields` (as the prompt names them), `answer` (the object that a right reply is).
* knowledge: `query` (a question), `reference` (the short answer), `accepted` (its spellings, `reference` first, of
  which a right reply holds one, as whole words, in any case).
"""

import json
from importlib.resources import files
from typing import Any

_QUERIES = "queries"


def names() -> list[str]:
    """Return the names of the built-in capabilities, sorted."""
    stems = (entry.name.removesuffix(".json") for entry in files(__name__).iterdir() if entry.name.endswith(".json"))
    return sorted(stem for stem in stems if not stem.endswith(_QUERIES))


def instructions() -> list[str]:
    """Return those of `names()` that are an instruction of IFEval, whose prompts come with and without it."""
    return [name for name in names() if "instruction_id" in _read(name)]


def prompts(name: str) -> list[dict[str, Any]]:
    """Return every prompt of one built-in capability.

    Args:
        name: One of `names()`.

    Returns:
        One dict per (query, wording). Of an instruction: `prompt` (the query, a space, the instruction), `without` (the
        query alone), `instruction_id` and `kwargs` (what lm-eval's checker of that instruction takes). Of a set:
        `prompt` and all that the file says of the query. The order is fixed and diagonal: any n neighbours, n up to the
        number of queries, have n different queries and take the wordings, and the variants, in turn.

    Raises:
        KeyError: If there is no such capability.
    """
    if name not in names():
        raise KeyError(name)
    table = _read(name)
    queries = table.get("queries", _QUERIES)
    if isinstance(queries, str):
        queries = _read(queries)
    make = _instruction_prompt if "instruction_id" in table else _set_prompt
    return [
        make(table, query, index + turn)
        for turn in range(len(table["phrasings"]))
        for index, query in enumerate(queries)
    ]


def _instruction_prompt(table: dict[str, Any], query: str, step: int) -> dict[str, Any]:
    variant = _in_turn(table.get("variants", [{}]), step)
    kwargs = {
        key: value.format(query=query) if isinstance(value, str) else value
        for key, value in {**table["kwargs"], **variant.get("kwargs", {})}.items()
    }
    wording = _in_turn(table["phrasings"], step).format(**kwargs, **variant.get("fill", {}))
    return {
        "prompt": f"{query} {wording}",
        "without": query,
        "instruction_id": table["instruction_id"],
        "kwargs": kwargs,
    }


def _set_prompt(table: dict[str, Any], item: dict[str, Any], step: int) -> dict[str, Any]:
    return {"prompt": _in_turn(table["phrasings"], step).format(**item), **item}


def _in_turn(choices: list[Any], step: int) -> Any:
    return choices[step % len(choices)]


def _read(stem: str) -> Any:
    return json.loads((files(__name__) / f"{stem}.json").read_text(encoding="utf-8"))
