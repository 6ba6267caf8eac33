"""Local documents, presets, and every refusal, with lm-eval's real task loader and no network."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from wpmerge.checkers import read_checkers, registered
from wpmerge.errors import EvaluationError
from wpmerge.ifeval import PUNKT_INSTRUCTIONS, ensure_punkt
from wpmerge.taskdata import judge_answer
from wpmerge.tasks import PRESETS, _members, _task_manager, expand_presets, instruct_alone, load_tasks, quiet

OFFICIAL = Path(__file__).parents[2] / "shared" / "data" / "ifeval.jsonl"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch as datasets and huggingface_hub hold it once they are imported."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(key: int, *ids: str, kwargs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"key": key, "prompt": f"Do {key}", "instruction_id_list": list(ids), "kwargs": kwargs or [{} for _ in ids]}


NO_COMMA = ask(1, "punctuation:no_comma")
WORDS = "length_constraints:number_words"
HIGHLIGHTS = ask(2, "detectable_format:number_highlighted_sections", kwargs=[{"num_highlights": 2}])


def test_a_local_file_stands_in_for_the_hub(tmp_path: Path) -> None:
    suite = load_tasks(["ifeval"], task_data={"ifeval": write(tmp_path / "a.jsonl", [NO_COMMA, HIGHLIGHTS])})
    documents = list(suite.leaves["ifeval"].eval_docs)
    assert [each["prompt"] for each in documents] == ["Do 1", "Do 2"]
    # absent arguments become None, as in the hub's data set
    assert [each["kwargs"] for each in documents] == [[{"num_highlights": None}], [{"num_highlights": 2}]]
    judged = suite.leaves["ifeval"].process_results(documents[1], ["*a* and *b*"])
    assert judged["prompt_level_strict_acc"] is True
    assert suite.sources["ifeval"]["evaluated"]["file"].endswith("a.jsonl")


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="needs ../shared/data")
@pytest.mark.skipif(ensure_punkt() is None, reason="needs nltk's punkt_tab tables")
def test_all_official_documents_load_and_are_judged() -> None:
    task = load_tasks(["ifeval"], task_data={"ifeval": OFFICIAL}).leaves["ifeval"]
    documents = task.eval_docs
    rows = [json.loads(line) for line in OFFICIAL.read_text().splitlines()]
    assert len(documents) == len(rows) == 541
    for document, row in zip(documents, rows, strict=True):
        given = [{name: value for name, value in each.items() if value is not None} for each in document["kwargs"]]
        assert given == row["kwargs"]
        judged = task.process_results(document, ["A title, and *some* text. "])
        assert len(judged["inst_level_strict_acc"]) == len(row["instruction_id_list"])


def test_local_files_make_tasks_of_their_own(tmp_path: Path) -> None:
    data = {
        "mine": write(tmp_path / "mine.jsonl", [NO_COMMA]),
        "sums": write(
            tmp_path / "sums.jsonl", [{"prompt": "2+2?", "answer": 4}, {"prompt": "as JSON", "answer": {"a": 1}}]
        ),
    }
    suite = load_tasks(["mine", "sums"], task_data=data)
    assert suite.names == ("mine", "sums")
    assert "inst_level_loose_acc" in suite.leaves["mine"].process_results(suite.leaves["mine"].eval_docs[0], ["x"])
    task = suite.leaves["sums"]
    four, record = task.eval_docs
    assert task.doc_to_text(four) == "2+2?"
    assert task.process_results(four, ["I think the answer is 4."]) == {"answer_acc": True}
    assert task.process_results(record, ['{"a": 1}']) == {"answer_acc": True}


CHECKERS = """
class Numbers:
    def __init__(self, instruction_id):
        self.id = instruction_id
    def build_description(self, *, N=None):
        self.wanted = 100 if N is None else N
    def get_instruction_args(self):
        return {"N": self.wanted}
    def check_following(self, value):
        return sum(word.strip(".").isdigit() for word in value.split()) == self.wanted

class Start(Numbers):
    def build_description(self, *, keyword=None):
        self.wanted = keyword
    def check_following(self, value):
        return value.startswith(self.wanted)

INSTRUCTION_DICT = {"count:numbers": Numbers, "words:start": Start}
"""


def test_rows_with_instructions_of_the_users_own(tmp_path: Path) -> None:
    none: dict[str, Any] = {"N": None, "keyword": None, "min_words": None, "options": None}
    rows = [
        ask(1, "count:numbers", "words:start", kwargs=[{**none, "N": 0}, {**none, "keyword": "No"}]),
        ask(2, "count:numbers", "punctuation:no_comma", kwargs=[{**none, "N": 2}, none]),
    ]
    data = {"ifbench": write(tmp_path / "ifbench.jsonl", rows)}
    with pytest.raises(EvaluationError, match=r"unknown IFEval instruction(.|\n)*count:numbers"):
        load_tasks(["ifbench"], task_data=data)
    (tmp_path / "checkers.py").write_text(CHECKERS)
    with registered(read_checkers([tmp_path / "checkers.py"])):
        task = load_tasks(["ifbench"], task_data=data).leaves["ifbench"]
        first, second = task.eval_docs
        assert task.process_results(first, ["No digits here."])["inst_level_strict_acc"] == [True, True]
        assert task.process_results(first, ["Not 1 digit."])["inst_level_strict_acc"] == [False, True]
        assert task.process_results(second, ["Words: 4 and 12."])["prompt_level_loose_acc"] is True
        assert task.process_results(second, ["4, 12 and 3."])["inst_level_strict_acc"] == [True, False]
        odd = write(tmp_path / "odd.jsonl", [rows[1], ask(3, "words:start", kwargs=[{"start": "No"}])])
        with pytest.raises(EvaluationError, match=r"odd.jsonl, document 2; .*checkers.py: words:start, build_desc"):
            load_tasks(["odd"], task_data={"odd": odd})
        null = write(tmp_path / "null.jsonl", [rows[1], {**rows[1], "kwargs": [{"N": 2}, None]}])
        with pytest.raises(EvaluationError, match=r"do not pair up(.|\n)*null.jsonl, document 2"):
            load_tasks(["null"], task_data={"null": null})


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        (4, "The answer is 5. No, the answer is 4.", True),
        (4, "The answer is 4. No, the answer is 5.", False),
        (4, "4", False),
        (1200, "the answer is $1,200", True),
        (-2.5, "The answer is -2.5", True),
        ({"a": [1, 2]}, ' {"a": [1, 2]}\n', True),
        ({"a": 1}, '{"a": 1} I hope', False),
        ([True], "[true]", True),
        (True, "true", True),
        (True, "1", False),
        ("Paris", " Paris\n", True),
        ("Paris", "paris", False),
        (4, "The answer is: 4.", True),
        (4, "The answer is **4**", True),
        ({"age": 1}, '{"age": true}', False),
    ],
)
def test_answers_are_judged_by_type(answer: Any, response: str, right: bool) -> None:
    assert judge_answer({"answer": json.dumps(answer)}, [response]) == {"answer_acc": right}


def test_presets() -> None:
    assert expand_presets(["ifeval", "ifeval"]) == ("ifeval",)
    assert expand_presets(["instruct"], ["mine"]) == ("ifeval", "mine")
    known = _task_manager(["mmlu"], []).task_index
    assert all(each in known for names in PRESETS.values() for each in names)
    assert [instruct_alone(["instruct"], each) for each in ([], ["ifeval"], ["ifeval", "mine"])] == [True, True, False]
    assert not instruct_alone(["ifeval"], [])
    with pytest.raises(EvaluationError, match="no task"):
        expand_presets([])


def test_a_task_that_needs_examples_asks_for_their_split(tmp_path: Path) -> None:
    rows = write(tmp_path / "g.jsonl", [{"question": "2+2?", "answer": "So #### 4"}] * 6)
    with pytest.raises(EvaluationError, match=r"split(.|\n)*train(.|\n)*--task-data gsm8k:train=FILE"):
        load_tasks(["gsm8k"], task_data={"gsm8k": rows})
    suite = load_tasks(["gsm8k"], task_data={"gsm8k": {"test": rows, "train": rows}})
    assert len(suite.leaves["gsm8k"].eval_docs) == 6


def test_examples_that_are_not_shown_need_no_split(tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2}
    suite = load_tasks(["mmlu_anatomy"], task_data={"mmlu_anatomy": write(tmp_path / "m.jsonl", [row])})
    task = suite.leaves["mmlu_anatomy"]  # it names a dev split, for examples that it shows only when asked to
    assert task.doc_to_text(task.eval_docs[0]) == "Which?\nA. a\nB. b\nC. c\nD. d\nAnswer:"


def test_examples_are_enough_and_readable(tmp_path: Path) -> None:
    row = {"question": "2+2?", "answer": "So #### 4"}
    test = write(tmp_path / "test.jsonl", [row])
    few = write(tmp_path / "few.jsonl", [row] * 4)
    odd = write(tmp_path / "odd.jsonl", [{"q": "?", "answer": "4"}] * 5)
    with pytest.raises(EvaluationError, match=r"more examples(.|\n)*gsm8k: .*few.jsonl(.|\n)*got: 4(.|\n)*at least 5"):
        load_tasks(["gsm8k"], task_data={"gsm8k": {"train": few, "test": test}})
    with pytest.raises(EvaluationError, match=r"odd.jsonl, example 1(.|\n)*question"):
        load_tasks(["gsm8k"], task_data={"gsm8k": {"train": odd, "": test}})
    with pytest.raises(EvaluationError, match=r"odd.jsonl(.|\n)*question"):
        load_tasks(["gsm8k"], task_data={"gsm8k": {"train": few, "test": odd}})


def test_a_task_whose_file_is_named_otherwise_is_found(tmp_path: Path) -> None:
    rows = write(tmp_path / "g.jsonl", [{"question": "2+2?", "answer": "So #### 4"}])
    task = load_tasks(["gsm8k_cot"], task_data={"gsm8k_cot": rows}).leaves["gsm8k_cot"]
    assert task.doc_to_text(task.eval_docs[0]) == "Q: 2+2?\nA:"  # lm-eval's own template, not the bare field
    assert task.doc_to_target(task.eval_docs[0]) == "4"
    # rows of our own form do not make it a task of ours
    ours = write(tmp_path / "ours.jsonl", [{"prompt": "2+2?", "answer": 4}])
    with pytest.raises(EvaluationError, match=r"gsm8k_cot are not what the task reads(.|\n)*question"):
        load_tasks(["gsm8k_cot"], task_data={"gsm8k_cot": ours})


def test_local_documents_of_a_group_are_refused_with_its_tasks(tmp_path: Path) -> None:
    rows = write(tmp_path / "m.jsonl", [{"prompt": "2+2?", "answer": 4}])
    with pytest.raises(EvaluationError, match=r"not for a group(.|\n)*mmlu is a group.*: mmlu_.*, .* and 5\d more"):
        load_tasks(["mmlu"], task_data={"mmlu": rows})


def test_tags_are_their_tasks_and_no_task_comes_twice(tmp_path: Path) -> None:
    row = {"problem": "2+2?", "solution": "So \\boxed{4}"}
    data = {"hendrycks_math_algebra": write(tmp_path / "m.jsonl", [row])}
    suite = load_tasks(["hendrycks_math_algebra"], task_data=data)
    assert suite.groups == {}
    manager = _task_manager(["hendrycks_math_algebra"], [])
    assert _members("hendrycks_math", manager.task_index)[:2] == [
        "hendrycks_math_algebra",
        "hendrycks_math_counting_and_prob",
    ]
    assert "gsm8k" in _members("math_word_problems", _task_manager(["gsm8k"], []).task_index)


def test_unknown_task_offers_the_nearest() -> None:
    with pytest.raises(EvaluationError, match=r"ifevl(.|\n)*near: ifeval"):
        load_tasks(["ifevl"])


def test_data_that_are_not_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(EvaluationError, match=r"not at hand(.|\n)*gsm8k(.|\n)*--task-data gsm8k=FILE"):
        load_tasks(["gsm8k"])


def test_without_the_judge_of_code_the_task_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import evaluate.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.humaneval.utils", raising=False)  # would not be loaded again
    rows = write(tmp_path / "h.jsonl", [{"prompt": "def f():", "test": "", "entry_point": "f"}])
    for data in ({"humaneval": rows}, {}):
        with pytest.raises(EvaluationError, match=r"program that judges code(.|\n)*humaneval(.|\n)*network"):
            load_tasks(["humaneval"], task_data=data, unsafe_code=True)


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("gsm8k_cot", [{"q": "2+2?", "answer": "#### 4"}], "UndefinedError.*question"),
        ("gsm8k_cot", [{"question": "a", "answer": "b"}, {"question": "c"}], r"lacks a field(.|\n)*document 2"),
        ("mmlu_anatomy", [{"question": "?", "choices": ["a"], "answer": 0}], "UndefinedError"),
        ("mmlu_anatomy", [{"question": None, "choices": list("abcd"), "answer": 0}] * 2, "UndefinedError.*strip"),
        ("hendrycks_math_algebra", [{"problem": "2+2?", "answer": "4"}], "KeyError.*solution"),
    ],
)
def test_documents_that_the_task_cannot_read(tmp_path: Path, task: str, rows: Sequence[Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        load_tasks([task], task_data={task: write(tmp_path / "d.jsonl", rows)})


def test_a_field_that_only_the_judge_reads_is_missed_before_the_run(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "key": 1, "instruction_id_list": ["punctuation:no_comma"]}]
    with pytest.raises(
        EvaluationError, match=r"document 1(.|\n)*KeyError: 'kwargs'(.|\n)*the document has prompt, key"
    ):
        data = {"leaderboard_ifeval": write(tmp_path / "d.jsonl", rows)}
        load_tasks(["leaderboard_ifeval"], task_data=data)


@pytest.mark.parametrize("task", ["humaneval", "humaneval_instruct", "mbpp_instruct", "full"])
def test_code_is_not_run_without_consent(task: str) -> None:
    asked = [each for each in expand_presets([task]) if "humaneval" in each or "mbpp" in each]
    assert asked
    for name in asked:
        with pytest.raises(EvaluationError, match=rf"runs code(.|\n)*{name}(.|\n)*--confirm-unsafe-code"):
            load_tasks([name])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ('{"key": 1}\n{oops\n', r"not JSON(.|\n)*line 2"),
        ("[1]\n", r"not a JSON object(.|\n)*line 1(.|\n)*list"),
        (json.dumps({"key": 1, "prompt": "p"}), r"lacks a field(.|\n)*document 1(.|\n)*instruction_id_list, kwargs"),
        (
            json.dumps(ask(1, "punctuation:no_coma")),
            r"unknown IFEval instruction(.|\n)*punctuation:no_comma(.|\n)*--checkers FILE",
        ),
        (json.dumps(ask(1, "punctuation:no_comma", kwargs=[{}, {}])), "do not pair up"),
        (json.dumps(ask(1)), "do not pair up"),
        ("\n".join(json.dumps({**NO_COMMA, "key": value}) for value in (1, "a")), "do not fit in one table"),
        (
            json.dumps(ask(1, "punctuation:no_comma", kwargs=[{"x": 1}])),
            r"document 1, punct(.|\n)*got: x: 1(.|\n)*no arg",
        ),
        ("\n".join(map(json.dumps, [NO_COMMA, ask(2, WORDS)])), rf"document 2, {WORDS}\n  got: no num_words"),
        (
            json.dumps(ask(1, WORDS, kwargs=[{"num_words": "ten", "relation": "at least"}])),
            rf'document 1, {WORDS}\n  got: num_words: "ten"',
        ),
        (
            json.dumps(ask(1, WORDS, kwargs=[{"num_words": 10, "relation": "around"}])),
            rf"document 1, {WORDS}\n  got: .*around is given",
        ),
        (json.dumps({**NO_COMMA, "kwargs": ["a"]}), "do not pair up"),
        (json.dumps({**NO_COMMA, "kwargs": [None]}), "do not pair up"),
        (json.dumps({**NO_COMMA, "instruction_id_list": [["punctuation:no_comma"]]}), "do not pair up"),
        *(
            (json.dumps({**NO_COMMA, "prompt": odd}), r"no prompt(.|\n)*document 1")
            for odd in (None, 5, ["hi"], "", " ")
        ),
        (json.dumps({**NO_COMMA, "prompt": "\ud800"}), r"written as UTF-8(.|\n)*line 1, field 'prompt'"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=message):
        load_tasks(["ifeval"], task_data={"ifeval": path})


@pytest.mark.parametrize("odd", [None, 5, ["hi"], ""])
def test_prompts_of_other_tasks_are_texts_too(tmp_path: Path, odd: Any) -> None:
    rows = write(tmp_path / "sums.jsonl", [{"prompt": "2+2?", "answer": 4}, {"prompt": odd, "answer": 4}])
    with pytest.raises(EvaluationError, match=r"no prompt(.|\n)*sums.jsonl, document 2"):
        load_tasks(["sums"], task_data={"sums": rows})
    rows = write(tmp_path / "l.jsonl", [{**NO_COMMA, "prompt": odd}])
    with pytest.raises(EvaluationError, match=r"no prompt(.|\n)*l.jsonl, document 1"):
        load_tasks(["leaderboard_ifeval"], task_data={"leaderboard_ifeval": rows})


def test_an_answer_that_no_reply_can_give_is_refused(tmp_path: Path) -> None:
    for number in ("NaN", "1e999"):
        (tmp_path / "sums.jsonl").write_text('{"prompt": "2+2?", "answer": ' + number + "}\n")
        with pytest.raises(EvaluationError, match=r"not finite(.|\n)*line 1, field 'answer'"):
            load_tasks(["sums"], task_data={"sums": tmp_path / "sums.jsonl"})


def test_each_split_has_one_file_and_is_read(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, [NO_COMMA]) for name in ("one.jsonl", "two.jsonl"))
    with pytest.raises(
        EvaluationError, match=r"two files(.|\n)*where: ifeval\n.*one.jsonl and .*two.jsonl(.|\n)*train"
    ):
        load_tasks(["ifeval"], task_data={"ifeval": {"": one, "train": two}})
    with pytest.raises(
        EvaluationError, match=r"does not read(.|\n)*demo: .*two.jsonl\n  got: foo\n  expected: train\n"
    ):
        load_tasks(["demo"], task_data={"demo": {"": one, "foo": two}})
    sums = write(tmp_path / "sums.jsonl", [{"question": "2+2?", "answer": "So #### 4"}] * 6)
    with pytest.raises(EvaluationError, match=r"does not read(.|\n)*got: validation\n  expected: test, train\n"):
        load_tasks(["gsm8k"], task_data={"gsm8k": {"": sums, "train": sums, "validation": sums}})
    assert len(load_tasks(["ifeval"], task_data={"ifeval": {"train": one}}).leaves["ifeval"].eval_docs) == 1


def test_other_refusals(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", [NO_COMMA])
    with pytest.raises(EvaluationError, match="cannot be read"):
        load_tasks(["ifeval"], task_data={"ifeval": tmp_path / "absent.jsonl"})
    with pytest.raises(EvaluationError, match=r"not evaluated(.|\n)*other"):
        load_tasks(["ifeval"], task_data={"ifeval": good, "other": good})
    with pytest.raises(EvaluationError, match="how to judge"):
        load_tasks(["mine"], task_data={"mine": write(tmp_path / "odd.jsonl", [{"question": "?"}])})


def test_instruction_types_without_their_tables_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setitem(__import__("sys").modules, "punkt.data.english", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = write(tmp_path / "a.jsonl", [NO_COMMA, *(ask(3, name) for name in PUNKT_INSTRUCTIONS)])
    with pytest.raises(EvaluationError, match=r"sentence splitter(.|\n)*capital_word_frequency(.|\n)*nltk-punkt"):
        load_tasks(["ifeval"], task_data={"ifeval": rows})
    load_tasks(["ifeval"], task_data={"ifeval": write(tmp_path / "b.jsonl", [NO_COMMA])})


def test_local_documents_leave_no_cache_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    cache = tmp_path / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    load_tasks(["ifeval"], task_data={"ifeval": write(tmp_path / "a.jsonl", [NO_COMMA])})
    assert not cache.exists()


def test_quiet_puts_everything_back(capfd: pytest.CaptureFixture[str]) -> None:
    import logging

    from tqdm import tqdm

    before = (tqdm.__init__, logging.getLogger("lm_eval").level)
    with pytest.raises(KeyError), quiet():
        list(tqdm(range(3), disable=False))
        logging.getLogger("lm_eval.tasks").warning("a warning")
        raise KeyError
    assert (tqdm.__init__, logging.getLogger("lm_eval").level) == before
    assert capfd.readouterr().err == ""
