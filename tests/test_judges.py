"""Replies are judged as the test file says, and a malformed file is refused with its line."""

import json

import pytest

from wpmerge.errors import EvaluationError
from wpmerge.judges import TestPrompt, hash_of_tests, judge, load_prompts, load_tests

NUMBER = TestPrompt(prompt="How many?", judge="number", answer=1043)
JSON = TestPrompt(prompt="As JSON.", judge="json", answer={"name": "Rosa", "age": 59})

WORDS = "length_constraints:number_words"


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("1000 + 43 = 1043. The answer is 1043.", True),
        ("The answer is 1,043", True),
        ("The answer is $1043.00 in all", True),
        ("The answer is 7. No, the answer is 1043.", True),
        ("The answer is 1043. No, the answer is 7.", False),
        ("The answer is: 1043.", True),
        ("The answer is **1043**", True),
        ("The answer is: **$1,043**.", True),
        ("The answer is `1043`", True),
        ("The answer is \u22121043", False),
        ("The answer is -1043.", False),
        ("1043", False),
        ("The answer is", False),
        ("", False),
    ],
)
def test_the_last_answer_counts(reply, right):
    assert judge(NUMBER, reply) is right


def test_a_negative_answer():
    item = TestPrompt(prompt="?", judge="number", answer=-4)
    for reply in ("The answer is -4.", "The answer is \u22124.", "The answer is: **-4**"):
        assert judge(item, reply)


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ('{"age": 59, "name": "Rosa"}', True),
        (' {"name": "Rosa", "age": 59}\n', True),
        ('{"name": "Rosa", "age": "59"}', False),
        ('{"name": "Rosa", "age": 59, "job": "pilot"}', False),
        ('Here: {"name": "Rosa", "age": 59}', False),
        ('{"name": "Rosa", "age": 59.0}', True),
        ("[" * 100_000, False),
    ],
)
def test_the_whole_reply_is_the_object(reply, right):
    assert judge(JSON, reply) is right


def test_a_truth_value_is_no_number():
    assert not judge(TestPrompt(prompt="?", judge="json", answer={"age": 1}), '{"age": true}')
    assert not judge(TestPrompt(prompt="?", judge="json", answer={"age": True}), '{"age": 1}')


def test_numbers_of_any_size_are_compared_exactly():
    assert judge(TestPrompt(prompt="?", judge="number", answer=10**400), f"the answer is {10**400}")
    assert not judge(TestPrompt(prompt="?", judge="number", answer=2**53), f"the answer is {2**53 + 1}")
    assert judge(TestPrompt(prompt="?", judge="number", answer=0.1), "the answer is 0.10")


def test_every_instruction_has_to_be_followed(tmp_path):
    row = {
        "prompt": "Say it.",
        "instruction_id_list": ["change_case:english_capital", "punctuation:no_comma"],
        "kwargs": [{}, {"unused": None}],
    }
    (item,) = load_tests(write(tmp_path / "t.jsonl", row))
    assert judge(item, "THIS IS MY ANSWER TO YOU")
    assert not judge(item, "THIS IS, INDEED, MY ANSWER")
    assert not judge(item, "this is my answer")


def test_a_file_is_read_in_order(tmp_path):
    rows = [{"prompt": "a", "answer": 4}, "", {"prompt": "b", "answer": {"x": 1}, "reference": "r"}]
    items = load_tests(write(tmp_path / "t.jsonl", *rows))
    assert [(item.prompt, item.judge, item.reference) for item in items] == [("a", "number", None), ("b", "json", "r")]
    assert load_prompts(tmp_path / "t.jsonl") == ("a", "b")
    assert hash_of_tests(items) != hash_of_tests(items[::-1])
    (plain,) = load_tests(write(tmp_path / "p.jsonl", {"prompt": "a", "reference": "b"}))
    assert plain.judge == "none"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2[\\s\\S]*JSON|JSON[\\s\\S]*line 2"),
        ({"answer": 3}, "has no prompt"),
        ({"prompt": " ", "answer": 3}, "has no prompt"),
        ({"prompt": "a"}, "no way of judging"),
        ({"prompt": "a", "answer": 3, "instruction_id_list": ["punctuation:no_comma"]}, "no way of judging"),
        ({"prompt": "a", "answer": True}, "neither a number nor an object"),
        ({"prompt": "a", "answer": "3"}, "neither a number nor an object"),
        ({"prompt": "a", "reference": ""}, "reference is not a text"),
        ({"prompt": ["a"], "answer": 3}, 'has no prompt[\\s\\S]*line 2[\\s\\S]*\\["a"\\]'),
        ('{"prompt": "a\\ud800", "answer": 3}', "written as UTF-8[\\s\\S]*line 2, field 'prompt'"),
        ('{"prompt": "a", "answer": NaN}', "not finite[\\s\\S]*line 2, field 'answer'"),
        ('{"prompt": "a", "answer": 1e999}', "not finite[\\s\\S]*line 2, field 'answer'"),
        ({"prompt": "a", "instruction_id_list": ["punctuation:no_comma"]}, "do not pair up"),
        ({"prompt": "a", "instruction_id_list": ["no:such"], "kwargs": [{}]}, "unknown IFEval instruction"),
        ({"prompt": "a", "instruction_id_list": [["no:such"]], "kwargs": [{}]}, "do not pair up"),
        ({"prompt": "a", "instruction_id_list": [{}], "kwargs": [{}]}, "do not pair up"),
        ({"prompt": "a", "instruction_id_list": [WORDS], "kwargs": [None]}, "do not pair up"),
        ({"prompt": "a", "instruction_id_list": [WORDS], "kwargs": [{}]}, f"line 2, {WORDS}\n  got: no num_words"),
        (
            {"prompt": "a", "instruction_id_list": [WORDS], "kwargs": [{"num_words": "ten", "relation": "at least"}]},
            f'line 2, {WORDS}\n  got: num_words: "ten"',
        ),
        ({"prompt": "a", "reference": "b"}, "some test prompts are judged and some are not"),
    ],
)
def test_a_malformed_line_is_refused(tmp_path, row, message):
    with pytest.raises(EvaluationError, match=message):
        load_tests(write(tmp_path / "t.jsonl", {"prompt": "fine", "answer": 1}, row))


def test_other_separators_stand_inside_a_text(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('\ufeff{"prompt": "a\u2028b", "answer": 3}\n', encoding="utf-8")
    assert load_prompts(path) == ("a\u2028b",)


def test_an_absent_or_empty_file_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="cannot be read"):
        load_tests(tmp_path / "none.jsonl")
    with pytest.raises(EvaluationError, match="empty"):
        load_prompts(write(tmp_path / "t.jsonl", ""))
