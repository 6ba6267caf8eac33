"""``wpmerge bench`` end to end on a tiny family: every strategy, equal budgets, resumption, and what is refused."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import WORDS
from test_fusing import Disk, make_disk
from typer.testing import CliRunner

from wpmerge.bench import BenchResult, _workplace, bench
from wpmerge.bench_setup import BenchSettings, check_subsets, split_tests, strategy_names
from wpmerge.errors import EvaluationError, OutputError, WpmergeError
from wpmerge.judges import load_tests
from wpmerge.plan import load_plan
from wpmerge.rules import FuseSettings
from wpmerge.strategies import OURS, RIVALS, Ours

ALONE = [name for name, rule in OURS.items() if not rule.retain]
SMALL = BenchSettings(seeds=(0, 1), evaluations=3, tune=4, longest=6, batch_size=8)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return make_disk(tmp_path_factory.mktemp("bench") / "family")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Test prompts of nothing but new words' orders; no reply of a random model is right."""
    place = tmp_path_factory.mktemp("tests")
    for name, shift in (("a", 0), ("b", 20)):
        rows = [{"prompt": f"w50 w51 w{i % (WORDS - 3) + 3} w{i + 3}", "answer": 4} for i in range(shift, shift + 10)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "retain.jsonl").write_text('{"prompt": "w9 w9"}\n{"prompt": "w8 w30 w8"}\n')
    return {name: place / f"{name}.jsonl" for name in ("a", "b", "retain")}


def run(disk: Disk, files: dict[str, Path], out: Path, **changes: Any) -> BenchResult:
    fields = {name: getattr(SMALL, name) for name in BenchSettings.__slots__}
    settings = BenchSettings(**{**fields, **changes})
    tests = {name: files[name] for name in ("a", "b")}
    return bench(disk.scores, out, tests=tests, retain=files["retain"], settings=settings)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(disk: Disk, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every strategy, both seeds."""
    out = tmp_path_factory.mktemp("finished") / "bench"
    names = (*RIVALS, *OURS, "fuse:select/shuffled", "fuse:select/norm")
    run(disk, files, out, strategies=names)  # the scores have no retain set, so rules bound by one are left out
    return out


def test_every_strategy_is_tuned_within_the_same_budget(finished: Path) -> None:
    found = {(line["strategy"], line["seed"]): line for line in lines(finished)}
    names = {name for name, _ in found if name[0] != "@"}
    assert names == {*RIVALS, *ALONE, "fuse:select/shuffled", "fuse:select/norm"}
    assert len(lines(finished)) == 2 * (len(names) + 3)
    for (name, _), line in found.items():
        if name[0] == "@":
            continue
        assert line["subset"] == ["a", "b"]
        looks = len(line["parameters"].get("checks", []))  # refine's, to know where to stop
        assert 1 <= line["evaluations"] - looks <= 3, name
        assert set(line["tuned"]) == {"a", "b"}
        for skill in ("a", "b"):
            assert line["skills"][skill]["correct"] == "00000"
            assert len(line["skills"][skill]["logprob"]) == 5
        assert len(line["retain"]) == 1
    assert found["scaled", 0]["evaluations"] == 3
    assert found["karcher", 0]["evaluations"] == 1


def test_the_own_reply_is_read_with_the_experts_own_probability(finished: Path) -> None:
    """The references are the experts' own replies, so log-probability retention is 1 for them, and 0 for the base."""
    found = {(tuple(line["subset"]), line["strategy"], line["seed"]): line for line in lines(finished)}
    for seed in (0, 1):
        for skill in ("a", "b"):
            own = found[(skill,), "@expert", seed]["skills"][skill]["logprob"]
            base = found[(), "@base", seed]["skills"][skill]["logprob"]
            assert sum(own) > sum(base)
        replies = json.loads((finished / "replies" / f"a-{seed}.json").read_text())["replies"]
        assert len(replies) == 5
        assert all(1 <= len(reply) <= 6 for reply in replies)


def test_the_rules_plan_and_its_controls(finished: Path) -> None:
    plan = load_plan(finished / "plans" / "a+b-fuse-select-0")
    assert plan.granularity == "unit"
    found = {(line["strategy"], line["seed"]): line for line in lines(finished)}
    kinds = [found[name, 0]["skills"]["a"]["logprob"] for name in ("fuse:select", "fuse:select/shuffled")]
    assert kinds[0] != kinds[1]


def test_uniform_and_scaled_are_the_same_by_mergekit_and_by_ours(finished: Path) -> None:
    found = {(line["strategy"], line["seed"]): line for line in lines(finished)}
    for name in ("uniform", "scaled"):
        one, other = found[name, 1], found[f"fuse:{name}", 1]
        scales = other["parameters"]["scales"]
        assert one["parameters"] == {f"weight.{expert}": scale for expert, scale in scales.items()}
        assert one["skills"]["b"]["logprob"] == pytest.approx(other["skills"]["b"]["logprob"], abs=2e-4)


def test_a_rerun_does_only_what_is_missing(disk: Disk, files: dict[str, Path], finished: Path) -> None:
    before = (finished / "results.jsonl").read_bytes()
    again = run(disk, files, finished, strategies=("uniform", "fuse:proportional"))
    assert (finished / "results.jsonl").read_bytes() == before
    assert [row.strategy for row in again.cells[1].rows] == ["uniform", "fuse:proportional"]
    kept = before.splitlines(keepends=True)
    gone = next(i for i, line in enumerate(kept) if json.loads(line)["strategy"] == "ties")
    (finished / "results.jsonl").write_bytes(b"".join(kept[:gone] + kept[gone + 1 :])[:-5])  # and the last one cut
    run(disk, files, finished, strategies=("ties", "fuse:select/norm"))

    def timeless(text: bytes) -> list[str]:
        return sorted(json.dumps({**json.loads(line), "seconds": 0}) for line in text.splitlines())

    assert timeless((finished / "results.jsonl").read_bytes()) == timeless(before)


def begun(finished: Path, out: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """A benchmark of which some lines are there, and these lines."""
    shutil.copytree(finished, out)
    kept = [line for line in lines(out) if keep(line)]
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return kept


def of_first_seed(line: dict[str, Any]) -> bool:
    return bool(line["seed"] == 0)


def test_only_the_best_go_on_to_further_seeds(
    disk: Disk, files: dict[str, Path], finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bench"
    first = begun(finished, out, of_first_seed)
    names = (*RIVALS, *ALONE, "fuse:select/shuffled", "fuse:select/norm")
    found = run(disk, files, out, strategies=names, finalists=1)
    _, on_first, _, on_both = found.cells  # the others are of replies, of which none is right
    assert (on_first.seeds, on_both.seeds) == ((0,), (0, 1))
    assert {row.strategy for row in on_first.rows} == set(names)
    went_on = {line["strategy"] for line in lines(out) if line["seed"] == 1 and line["strategy"][0] != "@"}
    assert went_on == {row.strategy for row in on_both.rows} < set(names)
    assert {"uniform", "scaled"} <= went_on
    tuned = {line["strategy"]: line["tuned"].values() for line in first if line["tuned"]}
    for group in (RIVALS, OURS):
        of_group = {name: list(kept) for name, kept in tuned.items() if name in group}
        for best in (sum, min):
            assert max(map(best, of_group.values())) == max(best(of_group[n]) for n in of_group.keys() & went_on)
    assert ("fuse:select/norm" in went_on) is ("fuse:select" in went_on)


def test_a_run_of_fewer_skills_goes_on_where_all_were_run(tmp_path: Path) -> None:
    def opened(**tests: str) -> dict[str, Any]:
        with _workplace(tmp_path / "bench", {"settings": 1, "tests": tests}):
            found: dict[str, Any] = json.loads((tmp_path / "bench" / "identity.json").read_text())
            return found["tests"]

    assert opened(a="1", b="2") == {"a": "1", "b": "2"}
    assert opened(b="2") == {"a": "1", "b": "2"}
    for other in ({"a": "4"}, {"b": "2", "c": "3"}):  # the base has not been tested on a third skill
        with pytest.raises(OutputError, match="other tests"):
            opened(**other)


def test_another_benchmark_is_not_mixed_in(disk: Disk, files: dict[str, Path], finished: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="other settings"):
        run(disk, files, finished, evaluations=5)
    with pytest.raises(OutputError, match="other tests"):
        run(disk, {**files, "b": files["a"]}, finished)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="not a directory of wpmerge bench"):
        run(disk, files, tmp_path / "mine")


def test_a_rule_joins_with_one_entry(
    disk: Disk, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its control makes of the plan is the same merge, where the rule gives one coefficient to everything."""
    monkeypatch.setitem(OURS, "fuse:mine", Ours(settings=FuseSettings(rule="uniform", evaluations=99)))  # type: ignore[arg-type]
    run(disk, files, tmp_path / "out", strategies=("fuse:mine/norm",), seeds=(0,))
    found = [line["strategy"] for line in lines(tmp_path / "out")]
    assert found == ["@expert", "@expert", "@base", "fuse:mine", "fuse:mine/norm"]
    own, control = lines(tmp_path / "out")[3:]
    assert own["evaluations"] <= SMALL.evaluations
    assert own["skills"]["a"]["logprob"] == pytest.approx(control["skills"]["a"]["logprob"], abs=2e-4)


def test_seeds_can_be_run_apart(disk: Disk, files: dict[str, Path], finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench"
    left = begun(finished, out, lambda line: (line["strategy"], line["seed"]) != ("uniform", 1))
    run(disk, files, out, strategies=("uniform",), only_seeds=(0,))
    assert lines(out) == left
    run(disk, files, out, strategies=("uniform",), only_seeds=(1,))
    assert {(line["strategy"], line["seed"]) for line in lines(out)[len(left) :]} == {("uniform", 1)}
    with pytest.raises(EvaluationError, match="none of the benchmark's seeds"):
        run(disk, files, out, strategies=("uniform",), only_seeds=(7,))


def test_a_part_of_the_work_sends_on_whom_the_whole_would(
    disk: Disk, files: dict[str, Path], finished: Path, tmp_path: Path
) -> None:
    """Rivals of which one is asked for: it goes on if it is the best of all that the first seed has seen."""
    out = tmp_path / "bench"
    first = begun(finished, out, of_first_seed)
    run(disk, files, out, strategies=RIVALS, finalists=1, only_seeds=(1,))
    went_on = {line["strategy"] for line in lines(out)[len(first) :]}
    for name in RIVALS:
        alone = tmp_path / name
        begun(finished, alone, of_first_seed)
        run(disk, files, alone, strategies=(name,), finalists=1, only_seeds=(1,))
        assert (name in {line["strategy"] for line in lines(alone)[len(first) :]}) == (name in went_on), name
    out = tmp_path / "unseen"
    begun(finished, out, lambda line: of_first_seed(line) and line["strategy"] != "uniform")
    with pytest.raises(EvaluationError, match="decided by seed 0"):
        run(disk, files, out, strategies=("uniform",), finalists=1, only_seeds=(1,))


def test_seeds_share_no_test_prompt(files: dict[str, Path]) -> None:
    items = load_tests(files["a"])
    parts = split_tests(items, SMALL)
    assert sorted(item.prompt for part in parts.values() for item in part) == sorted(item.prompt for item in items)
    assert [len(part) for part in parts.values()] == [5, 5]
    few = split_tests(items, BenchSettings(seeds=(0, 1, 2), tests=4))
    assert [len(part) for part in few.values()] == [2, 1, 1]


def test_subsets_and_strategies() -> None:
    assert check_subsets([], ["a", "b", "c"]) == (("a", "b", "c"), ("a", "b"), ("a", "c"), ("b", "c"))
    assert check_subsets([], ["a", "b"]) == (("a", "b"),)
    assert check_subsets([["c", "a"], ["a", "c"]], ["a", "b", "c"]) == (("a", "c"),)
    for wrong in (["a"], ["a", "a"], ["a", "z"]):
        with pytest.raises(EvaluationError, match="--subset"):
            check_subsets([wrong], ["a", "b", "c"])
    with pytest.raises(EvaluationError, match="at least two"):
        check_subsets([], ["a"])
    assert strategy_names(["fuse:select/norm", "ties"]) == ("fuse:select", "fuse:select/norm", "ties")
    assert not {"fuse:uniform", "fuse:scaled"} & set(strategy_names([]))
    with pytest.raises(WpmergeError, match="did you mean scaled"):
        strategy_names(["scald"])


def test_test_prompts_that_something_was_chosen_on_are_refused(
    disk: Disk, files: dict[str, Path], tmp_path: Path
) -> None:
    records = json.loads((disk.scores / "scores.json").read_text())["capabilities"]
    for seen in (records["a"]["scored"][0], records["b"]["held_out"]["prompts"][0]):
        (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": seen, "answer": 1}) + "\n")
        for changed in ({"a": tmp_path / "a.jsonl"}, {"retain": tmp_path / "a.jsonl"}):
            with pytest.raises(EvaluationError, match="was scored or is kept for tuning"):
                run(disk, {**files, **changed}, tmp_path / "out")
    tests = {name: files[name] for name in ("a", "b")}
    with pytest.raises(EvaluationError, match="was scored or is kept for tuning"):
        bench(disk.scores, tmp_path / "out", tests=tests, prompts={"b": files["a"]}, settings=SMALL)
    with pytest.raises(EvaluationError, match="--prompts names no expert"):
        bench(disk.scores, tmp_path / "out", tests=tests, prompts={"z": files["a"]}, settings=SMALL)
    with pytest.raises(WpmergeError, match="nope"):
        bench(disk.scores, tmp_path / "out", tests=tests, prompts={"b": tmp_path / "nope"}, settings=SMALL)
    assert not (tmp_path / "out").exists()


def test_too_few_prompts_are_said_before_any_work(
    disk: Disk, files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(EvaluationError, match="2 prompts for 3 seeds"):
        run(disk, files, tmp_path / "out", seeds=(0, 1, 2), tests=2)
    run(disk, files, tmp_path / "out", strategies=("karcher",), seeds=(0,), tune=1000)
    assert "every seed tunes on much the same" in caplog.text


def test_a_directory_that_a_kill_left_without_its_identity_is_taken(
    disk: Disk, files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lock").touch()
    run(disk, files, tmp_path / "out", strategies=("karcher",), seeds=(0,))
    assert lines(tmp_path / "out")


@pytest.mark.parametrize("part", ["wpmerge.replies._batch", "wpmerge.calibration.final_states"])
def test_memory_that_runs_out_is_one_error_and_nothing_is_lost(
    disk: Disk, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Where a single prompt does not fit, while a strategy is tuned or tested: what is finished stays."""
    from wpmerge.cli import app

    def greedy(*_: Any, **__: Any) -> Any:
        return torch.empty(1 << 60)

    tests = [f"--test={name}={files[name]}" for name in ("a", "b")]
    out = tmp_path / "out"
    command = ["bench", str(disk.scores), f"--out={out}", *tests, "--quick", "--evaluations=2", "--max-new-tokens=4"]
    assert CliRunner().invoke(app, [*command, "--strategy=karcher"]).exit_code == 0
    before = lines(out)
    with monkeypatch.context() as patch:
        patch.setattr(part, greedy)
        result = CliRunner().invoke(app, [*command, "--strategy=uniform"])
    assert result.exit_code == 2
    assert "error: memory ran out" in result.stderr and "Traceback" not in result.output
    assert lines(out) == before
    assert CliRunner().invoke(app, [*command, "--strategy=uniform"]).exit_code == 0
    assert len(lines(out)) == len(before) + 1


def test_the_command(disk: Disk, files: dict[str, Path], tmp_path: Path) -> None:
    from wpmerge.cli import app

    def call(*options: str) -> Any:
        return CliRunner().invoke(app, ["bench", str(disk.scores), "--out", str(tmp_path / "out"), *options])

    tests = [f"--test={name}={files[name]}" for name in ("a", "b")]
    quick = [*tests, "--quick", "--evaluations=2", "--max-new-tokens=4", "--strategy=uniform"]
    result = call(*quick, "--json")
    assert result.exit_code == 0, result.output
    cells = json.loads(result.stdout)["cells"]
    assert [(cell["measure"], cell["subset"]) for cell in cells] == [("generated", ["a", "b"]), ("logprob", ["a", "b"])]
    assert cells[1]["rows"][0]["evaluations"] == 2
    assert "uniform" in call(*quick).stdout
    assert call(*tests[:1]).exit_code == 2
    missing = call(*tests[:1], f"--test=z={files['a']}")
    assert missing.exit_code == 2


@pytest.mark.parametrize("text", ["{trunc", "[]", "\\xff"])
def test_a_damaged_identity_is_named(tmp_path: Path, text: str) -> None:
    out = tmp_path / "bench"
    with _workplace(out, {"settings": 1, "tests": {}}):
        pass
    (out / "identity.json").write_text(text)
    with pytest.raises(OutputError, match=r"identity\.json"), _workplace(out, {"settings": 1, "tests": {}}):
        pytest.fail("entered")


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left"), _workplace(tmp_path / "b", {"settings": 1, "tests": {}}):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
