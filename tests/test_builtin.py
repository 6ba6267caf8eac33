"""The built-in capabilities: enough of them, varied, fit for lm-eval's checkers, and none of IFEval's own prompts."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from wpmerge import builtin

IFEVAL = Path(__file__).parents[2] / "shared" / "data" / "ifeval.jsonl"
IDS = {
    "capital_letters": "change_case:english_capital",
    "no_comma": "punctuation:no_comma",
    "title": "detectable_format:title",
    "quotation": "startend:quotation",
    "highlighted_sections": "detectable_format:number_highlighted_sections",
    "multiple_sections": "detectable_format:multiple_sections",
}


def test_the_six_instructions_are_there() -> None:
    assert builtin.names() == sorted(IDS)
    with pytest.raises(KeyError):
        builtin.prompts("queries")


@pytest.mark.parametrize("name", sorted(IDS))
def test_prompts_are_many_and_unique(name: str) -> None:
    prompts = builtin.prompts(name)
    queries = {p["without"] for p in prompts}
    wordings = {p["prompt"].removeprefix(p["without"] + " ") for p in prompts}
    assert len(queries) >= 40
    assert len(wordings) >= 4
    assert len({p["prompt"] for p in prompts}) == len(prompts) == len(queries) * len(wordings)
    assert {p["instruction_id"] for p in prompts} == {IDS[name]}
    assert prompts == builtin.prompts(name)


@pytest.mark.parametrize("name", sorted(IDS))
def test_a_short_prefix_varies_in_queries_and_wordings(name: str) -> None:
    prefix = builtin.prompts(name)[:8]
    wordings = [p["prompt"].removeprefix(p["without"]) for p in prefix]
    assert len({p["without"] for p in prefix}) == 8
    assert len(set(wordings)) >= 4
    assert all(a != b for a, b in pairwise(wordings))


@pytest.mark.parametrize("name", sorted(IDS))
def test_wordings_name_what_the_checker_wants(name: str) -> None:
    """A wording that asks for three of something while the checker counts two would measure another instruction."""
    for prompt in builtin.prompts(name):
        instruction = prompt["prompt"].removeprefix(prompt["without"])
        for key, value in prompt["kwargs"].items():
            if key == "section_spliter":
                assert value in instruction
            else:
                assert value == 3
                assert "three" in instruction or "3" in instruction


@pytest.mark.skipif(not IFEVAL.exists(), reason="IFEval's prompts are not at hand")
def test_no_prompt_is_from_ifeval() -> None:
    ifeval = {json.loads(line)["prompt"].strip().lower() for line in IFEVAL.read_text().splitlines()}
    for name in builtin.names():
        for prompt in builtin.prompts(name):
            assert prompt["prompt"].lower() not in ifeval
            assert not any(prompt["prompt"].removeprefix(prompt["without"]).strip().lower() in p for p in ifeval)
