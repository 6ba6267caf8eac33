"""What is finished stays finished: lines survive, a cut one is dropped, a foreign one is named."""

from dataclasses import replace
from pathlib import Path

import pytest

from wpmerge.bench_results import Record, ResultFile, SkillResult
from wpmerge.errors import EvaluationError

RECORD = Record(
    subset=("a", "b"),
    strategy="ties",
    seed=1,
    skills={"a": SkillResult(correct="0110", logprob=(-0.5, -0.25, 0.0, -1.0), unfinished=1), "b": SkillResult()},
    retain=(-1.5,),
    parameters={"density": 0.5},
    tuned={"a": 0.75},
    evaluations=24,
    seconds={"tune": 1.5},
)


def test_records_come_back_as_they_were(tmp_path):
    file = ResultFile(tmp_path / "r.jsonl")
    file.append(RECORD)
    assert ResultFile(tmp_path / "r.jsonl").find(["a", "b"], "ties", 1) == RECORD
    assert file.find(("b", "a"), "ties", 1) is None


def test_a_later_line_replaces_an_earlier_one(tmp_path):
    file = ResultFile(tmp_path / "r.jsonl")
    file.append(RECORD)
    file.append(Record(subset=("a", "b"), strategy="ties", seed=1, skills={}))
    assert ResultFile(tmp_path / "r.jsonl").find(("a", "b"), "ties", 1).skills == {}


@pytest.mark.parametrize("cut", [1, 10, 50])
def test_a_line_cut_by_a_kill_is_dropped_and_work_goes_on(tmp_path, cut, caplog):
    path = tmp_path / "r.jsonl"
    ResultFile(path).append(RECORD)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-cut])
    file = ResultFile(path)
    assert "cut short" in caplog.text
    assert list(file.records) == [RECORD.key]
    file.append(Record(subset=("b",), strategy="@expert", seed=0, skills={}))
    assert len(ResultFile(path).records) == 2


def test_a_foreign_line_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    ResultFile(path).append(RECORD)
    path.write_bytes(path.read_bytes() + b'{"strategy": "ties"}\n')
    with pytest.raises(EvaluationError, match="line 2"):
        ResultFile(path)


def test_a_record_is_the_same_before_and_after_a_rerun(tmp_path: Path) -> None:
    """Numbers are kept to five digits, and the run that made them goes on with what it kept."""
    file = ResultFile(tmp_path / "results.jsonl")
    exact = replace(RECORD, skills={"a": SkillResult(correct="1", logprob=(-1 / 3,))}, retain=(-2 / 3,))
    file.append(exact)
    assert file.records == ResultFile(tmp_path / "results.jsonl").records != {exact.key: exact}


def test_a_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(EvaluationError, match="line 1"):
        ResultFile(tmp_path / "results.jsonl")
