"""`wpmerge questions`: a model whose user's turn is known by heart asks exactly what it was made to ask."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from talkers import talker, talker_tokenizer
from typer.testing import CliRunner

from wpmerge import cli
from wpmerge.capability import Chat, load_capability
from wpmerge.errors import CapabilityError, CheckpointError, OutputError
from wpmerge.questions import QuestionSettings, write_questions

ASKED = {
    "this is my answer to you",
    "the number 4",
    "the number 12",
    "it has no more words",
    "THIS IS MY ANSWER TO YOU",
}
"""All that the model asks within six tokens, beside what is not finished and one word alone."""


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A talker that speaks as the user too: what follows a word is drawn among equals."""
    model, tokenizer = talker("this is my answer ."), talker_tokenizer()
    follows = {
        "<user>": ["this", "the", "it", "THIS", "words", "and"],
        "and": ["and"],  # without an end
    }
    for words in map(str.split, sorted(ASKED)):
        for word, following in pairwise([*words, "<assistant>"]):
            follows[word] = sorted({*follows.get(word, []), following})
    with torch.no_grad():
        for word, following in follows.items():
            column = model.lm_head.weight[:, tokenizer.convert_tokens_to_ids(word)]
            column.zero_()[tokenizer.convert_tokens_to_ids(following)] = 50
    path = tmp_path_factory.mktemp("models") / "asker"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def settings(count: int, seed: int = 0) -> QuestionSettings:
    return QuestionSettings(count=count, longest=8, seed=seed)


def test_what_a_model_asks_is_kept_once_each_and_can_be_scored(asker: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "plain.jsonl", []
    found = write_questions(str(asker), out, settings=settings(5), progress=lambda *new: said.append(new))
    assert set(found.texts) == ASKED and len(found.texts) == 5 < found.draws == len(said)
    assert said[-1] == ("questions", 5, 5)
    assert [prompt.prompt for prompt in load_capability("plain", str(out)).prompts] == list(found.texts)


def test_the_seed_decides_and_the_generator_of_others_is_left_alone(asker: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    orders = [
        write_questions(str(asker), tmp_path / f"{number}.jsonl", settings=settings(5, seed)).texts
        for number, seed in enumerate((0, 0, 1, 2, 3))
    ]
    assert torch.equal(torch.rand(3), expected)
    assert orders[0] == orders[1] and len(set(orders)) > 1


def test_a_model_that_asks_too_little_is_refused_and_nothing_is_written(asker: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain.jsonl"
    with pytest.raises(CapabilityError, match="5 that are finished within 8 tokens and differ"):
        write_questions(str(asker), out, settings=settings(6))
    with pytest.raises(CapabilityError, match="2 that are finished within 4 tokens"):
        write_questions(str(asker), out, settings=QuestionSettings(count=5, longest=4))
    assert not out.exists()


def test_a_file_that_is_there_is_refused_before_a_model_is_read(asker: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain.jsonl"
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        write_questions(str(tmp_path / "none"), out)
    with pytest.raises(CheckpointError):
        write_questions(str(tmp_path / "none"), out, overwrite=True)
    assert out.read_text() == "mine"
    write_questions(str(asker), out, settings=settings(4), overwrite=True)
    assert len(out.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [("count", 3), ("longest", 3), ("temperature", 0.0), ("temperature", float("nan")), ("top_p", 1.1)],
)
def test_numbers_out_of_their_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(CapabilityError, match=f"{field} is out of range"):
        QuestionSettings(**{field: value})  # type: ignore[arg-type]


def test_where_a_user_speaks_in_a_template_and_without_one() -> None:
    """Of a tokenizer without one, ``Q: …`` up to the end of the line's answer."""
    tokenizer = talker_tokenizer()
    user, assistant = tokenizer.convert_tokens_to_ids(["<user>", "<assistant>"])
    assert Chat(tokenizer).user_turn() == ([user], assistant)
    plain = talker_tokenizer(template=None)
    assert Chat(plain).user_turn() == (plain("Q:")["input_ids"], plain("A:")["input_ids"][0])


@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}<user> hello {% endfor %}<assistant>", "{{ messages[0]['content'] }}", "{{ nothing() }}"],
)
def test_a_template_that_cannot_be_taken_apart_is_refused(template: str) -> None:
    with pytest.raises(CapabilityError, match="chat template"):
        Chat(talker_tokenizer(template=template)).user_turn()


def test_the_command_prints_what_it_wrote(asker: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain.jsonl"
    words = ["questions", str(asker), "--out", str(out), "--count", "4", "--longest", "8"]
    result = CliRunner().invoke(cli.app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["questions"] == 4
    again = CliRunner().invoke(cli.app, words)
    assert again.exit_code == 2 and "exists" in again.stderr
