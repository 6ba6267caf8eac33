"""The Evaluation artifact: statistics over stored outcomes, flags, round trip."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from wpmerge.errors import EvaluationError
from wpmerge.evaluation import (
    Evaluation,
    GroupMetric,
    ModelResult,
    Score,
    Skill,
    load_evaluation,
    only_type,
    score_of,
    to_json,
)

INSTRUCTIONS = [["a"], ["b"], ["a", "b"], ["b"]]


def result(*credits: list[int], template: str | None = "t", truncated: int = 0) -> ModelResult:
    rows = {"t/inst_level_strict_acc": list(credits), "t/prompt": [[int(all(row))] for row in credits]}
    return ModelResult(
        source="somewhere",
        chat_template=template,
        batch_size=8,
        truncated=truncated,
        seconds=1.5,
        scores={
            **{name: score_of(row) for name, row in rows.items()},
            "t/inst_level_strict_acc/a": score_of(only_type(rows["t/inst_level_strict_acc"], INSTRUCTIONS, "a")),
            "group/acc": Score(value=0.5, stderr=math.nan, n=4),
        },
        credits=rows,
    )


@pytest.fixture
def evaluation() -> Evaluation:
    return Evaluation(
        models={
            "base": result([0], [0], [0, 1], [1]),
            "expert": result([1], [1], [1, 1], [1]),
            "merge": result([1], [0], [1, 1], [0]),
        },
        documents={"t": ["d0", "d1", "d2", "d3"]},
        instructions={"t": INSTRUCTIONS},
        reference="base",
        base="base",
        skills={
            "all": Skill(expert="expert", metric="t/prompt"),
            "a": Skill(expert="expert", metric="t/inst_level_strict_acc/a"),
        },
        settings={"limit": None},
        provenance={"versions": {"torch": "2"}},
    )


def test_scores_of_levels_and_types(evaluation: Evaluation) -> None:
    scores = evaluation.models["merge"].scores
    assert scores["t/inst_level_strict_acc"].value == 3 / 5
    assert scores["t/prompt"].value == 2 / 4
    # type a is asked for in documents 0 and 2 and followed in both
    assert (scores["t/inst_level_strict_acc/a"].value, scores["t/inst_level_strict_acc/a"].n) == (1.0, 2)


def test_differences_are_to_the_reference(evaluation: Evaluation) -> None:
    found = evaluation.differences()
    assert set(found) == {"expert", "merge"}
    assert set(found["merge"]) == {"t/inst_level_strict_acc", "t/prompt", "t/inst_level_strict_acc/a"}
    assert found["merge"]["t/prompt"].value == pytest.approx(1 / 4)  # 2 of 4 against 1 of 4
    assert found["merge"]["t/inst_level_strict_acc/a"].value == 1.0
    assert found["merge"]["t/prompt"].low < 0.25 < found["merge"]["t/prompt"].high
    assert replace(evaluation, reference=None).differences() == {}


def test_retention_per_skill(evaluation: Evaluation) -> None:
    found = evaluation.retention()
    assert set(found) == {"expert", "merge"}
    assert found["merge"].skills["all"].value == pytest.approx((2 / 4 - 1 / 4) / (1 - 1 / 4))
    assert found["merge"].skills["a"].value == 1.0
    assert found["merge"].minimum.value == pytest.approx(1 / 3)
    assert found["merge"].mean.value == pytest.approx(2 / 3)
    assert found["expert"].mean.value == 1.0
    assert replace(evaluation, base=None).retention() == {}


def test_flags(evaluation: Evaluation) -> None:
    assert evaluation.flags() == []
    silent = result([0], [0], [0, 0], [0], template=None, truncated=2)
    flags = replace(evaluation, models={**evaluation.models, "broken": silent}).flags()
    # one line for the task; its single instruction types are not named
    assert [flag for flag in flags if " is 0 " in flag] == [
        "broken: t is 0 (inst_level_strict_acc, prompt) where other models, the base too, are above 0; "
        "check chat template and parser"
    ]
    assert any("2 prompts were cut" in flag for flag in flags)
    assert any("different chat templates" in flag for flag in flags)
    halved = {**evaluation.models, "base": replace(evaluation.models["base"], batch_size=4)}
    assert [flag[:43] for flag in replace(evaluation, models=halved).flags()] == [
        "the models were run at different batch size"
    ]


def test_a_zero_is_doubtful_without_skills_and_for_experts_too(evaluation: Evaluation) -> None:
    plain = replace(evaluation, skills={})
    silent = result([0], [0], [0, 0], [0])

    def zeros(found: Evaluation) -> list[str]:
        return [flag.partition(":")[0] for flag in found.flags() if " is 0 " in flag]

    assert zeros(replace(plain, models={**plain.models, "expert": silent})) == ["expert"]
    assert zeros(replace(plain, models={**plain.models, "base": silent})) == []  # what a base cannot do yet
    assert zeros(replace(plain, models={**plain.models, "expert": silent}, base=None, reference=None)) == ["expert"]
    # two models alone say nothing: the task may be beyond the second
    assert zeros(replace(plain, models={"base": plain.models["base"], "merge": silent})) == []


def accuracy(*tasks: list[int]) -> ModelResult:
    rows = {f"t{number}/acc": [[each] for each in task] for number, task in enumerate(tasks)}
    scores = {name: score_of(row) for name, row in rows.items()}
    mean = sum(score.value for score in scores.values()) / len(scores)
    scores["group/acc"] = Score(value=mean, stderr=math.nan, n=sum(map(len, tasks)))
    return replace(result([0], [0], [0, 0], [0]), scores=scores, credits=rows)


@pytest.fixture
def grouped() -> Evaluation:
    return Evaluation(
        models={
            "base": accuracy([0, 0], [1, 0, 0, 0, 0, 0]),
            "expert": accuracy([1, 1], [1, 1, 1, 0, 0, 0]),
            "merge": accuracy([1, 0], [1, 1, 0, 0, 0, 0]),
        },
        documents={"t0": ["a", "b"], "t1": list("cdefgh")},
        instructions={},
        reference="base",
        base="base",
        skills={"g": Skill(expert="expert", metric="group/acc")},
        groups={"group/acc": GroupMetric(members=["t0/acc", "t1/acc"], by_size=False)},
    )


def test_groups_have_differences_and_retention(grouped: Evaluation, tmp_path: Path) -> None:
    (base, expert, merge) = (1 / 6 / 2, (1 + 1 / 2) / 2, (1 / 2 + 1 / 3) / 2)
    found = grouped.differences()["merge"]
    assert set(found) == {"t0/acc", "t1/acc", "group/acc"}
    assert found["group/acc"].value == pytest.approx(merge - base)
    assert found["group/acc"].low < found["group/acc"].value < found["group/acc"].high
    assert grouped.retention()["merge"].skills["g"].value == pytest.approx((merge - base) / (expert - base))
    sized = replace(grouped, groups={"group/acc": GroupMetric(members=["t0/acc", "t1/acc"], by_size=True)})
    assert sized.differences()["merge"]["group/acc"].value == pytest.approx(3 / 8 - 1 / 8)
    (tmp_path / "evaluation.json").write_text(to_json(grouped))
    assert load_evaluation(tmp_path) == grouped


def test_a_group_that_is_0_is_said_once(grouped: Evaluation) -> None:
    above = accuracy([1, 0], [1, 0, 0, 0, 0, 0])
    silent = {**grouped.models, "base": above, "merge": accuracy([0, 0], [0] * 6)}
    assert [flag.partition(" where")[0] for flag in replace(grouped, models=silent).flags()] == [
        "merge: group is 0 (acc)"
    ]


def test_only_metrics_with_outcomes_are_offered(grouped: Evaluation) -> None:
    lacking = replace(grouped, groups={})
    with pytest.raises(EvaluationError) as caught:
        lacking.outcomes("merge", "group/acc")
    assert caught.value.expected == "t0/acc, t1/acc"


def test_round_trip(evaluation: Evaluation, tmp_path: Path) -> None:
    text = to_json(evaluation)
    (tmp_path / "evaluation.json").write_text(text)
    loaded = load_evaluation(tmp_path)
    assert to_json(loaded) == text
    assert loaded.retention()["merge"].skills["all"] == evaluation.retention()["merge"].skills["all"]
    assert math.isnan(loaded.models["base"].scores["group/acc"].stderr)
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (found["schema"], found["kind"]) == (1, "evaluation")
    assert found["derived"]["retention"]["merge"]["minimum"]["value"] == pytest.approx(1 / 3)
    assert found["models"]["merge"]["credits"]["t/inst_level_strict_acc"] == [[1], [0], [1, 1], [0]]


def test_unknown_names_are_refused(evaluation: Evaluation) -> None:
    with pytest.raises(EvaluationError, match=r"no such model(.|\n)*base, expert, merge"):
        evaluation.outcomes("nobody", "t/prompt")
    for metric in ["t/nothing", "t/inst_level_strict_acc/c", "group/acc"]:
        with pytest.raises(EvaluationError, match="no outcomes of such a metric"):
            evaluation.outcomes("merge", metric)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"kind": "evaluation", "schema": 1}', "cannot be read"),
        ('{"kind": "evaluation", "schema": 99}', "another version"),
        ('{"kind": "scores", "schema": 1}', "another version"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(text)
    with pytest.raises(EvaluationError, match=message):
        load_evaluation(file)
    with pytest.raises(EvaluationError, match="cannot be read"):
        load_evaluation(tmp_path / "absent")
