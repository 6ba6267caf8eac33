"""Local documents, presets, and every refusal, with lm-eval's real task loader and no network."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from wpmerge.errors import EvaluationError
from wpmerge.ifeval import PUNKT_INSTRUCTIONS, ensure_punkt
from wpmerge.taskdata import judge_answer
from wpmerge.tasks import expand_presets, load_tasks, quiet

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
    documents = load_tasks(["ifeval"], task_data={"ifeval": OFFICIAL}).leaves["ifeval"].eval_docs
    rows = [json.loads(line) for line in OFFICIAL.read_text().splitlines()]
    assert len(documents) == len(rows) == 541
    task = load_tasks(["ifeval"], task_data={"ifeval": OFFICIAL}).leaves["ifeval"]
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
    ],
)
def test_answers_are_judged_by_type(answer: Any, response: str, right: bool) -> None:
    assert judge_answer({"answer": json.dumps(answer)}, [response]) == {"answer_acc": right}


def test_presets() -> None:
    assert expand_presets(["ifeval", "ifeval"]) == ("ifeval",)
    assert expand_presets(["instruct"], ["mine"]) == ("ifeval", "mine")
    assert set(expand_presets(["full"])) == {"ifeval", "gsm8k", "hendrycks_math", "humaneval", "mbpp", "mmlu"}
    with pytest.raises(EvaluationError, match="no task"):
        expand_presets([])


def test_a_task_that_needs_examples_asks_for_their_split(tmp_path: Path) -> None:
    rows = write(tmp_path / "g.jsonl", [{"question": "2+2?", "answer": "So #### 4"}] * 6)
    with pytest.raises(EvaluationError, match=r"split(.|\n)*train(.|\n)*--task-data gsm8k:train=FILE"):
        load_tasks(["gsm8k"], task_data={"gsm8k": rows})
    suite = load_tasks(["gsm8k"], task_data={"gsm8k": {"test": rows, "train": rows}})
    assert len(suite.leaves["gsm8k"].eval_docs) == 6


def test_unknown_task_offers_the_nearest() -> None:
    with pytest.raises(EvaluationError, match=r"ifevl(.|\n)*near: ifeval"):
        load_tasks(["ifevl"])


def test_data_that_are_not_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(EvaluationError, match=r"not at hand(.|\n)*gsm8k(.|\n)*--task-data gsm8k=FILE"):
        load_tasks(["gsm8k"])


def test_code_is_not_run_without_consent() -> None:
    with pytest.raises(EvaluationError, match=r"runs code(.|\n)*humaneval(.|\n)*--confirm-unsafe-code"):
        load_tasks(["humaneval"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ('{"key": 1}\n{oops\n', r"not JSON(.|\n)*line 2"),
        ("[1]\n", r"not a JSON object(.|\n)*line 1(.|\n)*list"),
        (json.dumps({"key": 1, "prompt": "p"}), r"lacks a field(.|\n)*document 1(.|\n)*instruction_id_list, kwargs"),
        (json.dumps(ask(1, "punctuation:no_coma")), r"unknown IFEval instruction(.|\n)*punctuation:no_comma"),
        (json.dumps(ask(1, "punctuation:no_comma", kwargs=[{}, {}])), "do not pair up"),
        (json.dumps(ask(1)), "do not pair up"),
        (
            "\n".join(json.dumps(ask(1, "punctuation:no_comma", kwargs=[{"x": value}])) for value in (1, "a")),
            "do not fit in one table",
        ),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=message):
        load_tasks(["ifeval"], task_data={"ifeval": path})


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
