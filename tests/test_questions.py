"""`wpmerge questions`: a model whose user's turn is known by heart asks exactly what it was made to ask."""

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from talkers import TEMPLATE, talker, talker_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
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
"""All that the model asks, beside what is not finished or has fewer than three words."""


def save_asker(
    path: Path,
    *,
    more: Mapping[str, list[str]] | None = None,
    likeliest: str | None = None,
    end: str = "<assistant>",
    template: str = TEMPLATE,
    stops: tuple[str, ...] = (),
) -> Path:
    """A talker that speaks as the user too: what follows a word is drawn among equals.

    Args:
        path: where it is saved.
        more: word → words that may follow besides.
        likeliest: of the first words, the one that is drawn unless it is hot.
        end: what ends a question.
        template: the chat template.
        stops: more tokens that end a reply.
    """
    model, tokenizer = talker("this is my answer ."), talker_tokenizer(template=template)
    follows: dict[str, set[str]] = {
        "<user>": {"this", "the", "it", "THIS", "words", "more", "and"},
        "and": {"and"},  # without an end
        "words": {end},  # alone, or after "more": too few to ask anything
    }
    for words in map(str.split, sorted(ASKED)):
        for word, following in pairwise([*words, end]):
            follows.setdefault(word, set()).add(following)
    for word, others in (more or {}).items():
        follows[word] |= set(others)
    with torch.no_grad():
        for word, following in follows.items():
            column = model.lm_head.weight[:, tokenizer.convert_tokens_to_ids(word)]
            column.zero_()[tokenizer.convert_tokens_to_ids(sorted(following))] = 50
        if likeliest:
            model.lm_head.weight[
                tokenizer.convert_tokens_to_ids(likeliest), tokenizer.convert_tokens_to_ids("<user>")
            ] = 52
    if stops:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<eos>", *stops])
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_asker(tmp_path_factory.mktemp("models") / "asker")


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
    "given",
    [
        {"more": {"words": [","]}, "stops": (",",)},
        {"more": {"words": ["<eos>"]}},
        {"more": {"4": ["<user>"], "12": ["<pad>"]}},
        {"end": ".", "template": "{% for m in messages %}<user> {{ m['content'] }} .{% endfor %}"},
    ],
    ids=["another stop", "end of text", "special tokens within", "ended by words"],
)
def test_only_what_ends_as_a_users_words_do_is_kept(given: dict[str, Any], tmp_path: Path) -> None:
    path = save_asker(tmp_path / "asker", **given)
    assert set(write_questions(str(path), tmp_path / "plain.jsonl", settings=settings(5)).texts) == ASKED


def test_temperature_and_top_p_decide_what_is_drawn(asker: Path, tmp_path: Path) -> None:
    path = save_asker(tmp_path / "asker", likeliest="the")
    hot = QuestionSettings(count=5, longest=8, temperature=10.0)
    assert set(write_questions(str(path), tmp_path / "hot.jsonl", settings=hot).texts) == ASKED
    with pytest.raises(CapabilityError, match="2 that are finished"):
        write_questions(str(path), tmp_path / "cold.jsonl", settings=settings(5))
    with pytest.raises(CapabilityError, match="too few"):  # two or three of the seven first words
        write_questions(str(asker), tmp_path / "few.jsonl", settings=QuestionSettings(count=5, longest=8, top_p=0.3))


def test_questions_beyond_the_models_positions_are_refused(asker: Path, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="1 tokens before a question, and up to 128"):
        write_questions(str(asker), tmp_path / "plain.jsonl", settings=QuestionSettings(count=5, longest=128))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 3),
        ("longest", 3),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("top_p", 1.1),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_numbers_out_of_their_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(CapabilityError, match=f"{field} is out of range"):
        QuestionSettings(**{field: value})  # type: ignore[arg-type]


def byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that joins a question mark with the line's end, as GPT-4's and Llama 3's do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "?Ċ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("?", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|im_end|>x"]})
    fast.chat_template = template
    return fast


def piece_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One of SentencePiece's kind: a space before every text, and before a word as part of it."""
    letters = [chr(code) for code in range(32, 127)] + ["▁", "\n"]
    vocabulary = {letter: number for number, letter in enumerate(["<s>", *letters, "▁[", "▁A"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "["), ("▁", "A")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.chat_template = template
    return fast


SAYS = "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    ("tokenizer", "template", "end"),
    [
        (byte_tokenizer, f"<|im_start|>user\n{SAYS}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
        (byte_tokenizer, f"<|im_start|>user\n{SAYS}\n<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
        (byte_tokenizer, f"### Instruction:\n{SAYS}\n\n### Response:\n", "\n### Response:"),
        (byte_tokenizer, None, "\nA:"),
        (piece_tokenizer, f"<s>[INST] {SAYS} [/INST]", "[/INST]"),
        (piece_tokenizer, f"<s>USER: {SAYS} ASSISTANT:", "ASSISTANT:"),
        (piece_tokenizer, None, "\nA:"),
    ],
)
def test_where_a_users_words_begin_and_what_ends_them(
    tokenizer: Callable[[str | None], PreTrainedTokenizerFast], template: str | None, end: str
) -> None:
    chat = Chat(tokenizer(template))
    head, ends = chat.user_turn()
    assert ends == end
    for question in ("What is it?", "in 1950"):
        whole = chat.prompt_tokens(question)
        assert whole[: len(head)] == head and len(head) < len(whole)
        said, found, _ = chat.tokenizer.decode(whole[len(head) :]).partition(end)
        assert (said.strip(), found) == (question, end)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<user> hello {% endfor %}<assistant>",
        "{{ messages[0]['content'] }}",
        "{{ nothing() }}",
        "{{ messages[0]['content'] }}<assistant>",
    ],
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
    nowhere = CliRunner().invoke(cli.app, [*words, "--overwrite", "--device", "nowhere"])
    assert nowhere.exit_code == 2 and "--device" in nowhere.stderr


def test_a_place_that_cannot_be_written_is_one_error(asker: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be used"):
        write_questions(str(asker), tmp_path / f"{'x' * 250}.jsonl", settings=settings(4))
