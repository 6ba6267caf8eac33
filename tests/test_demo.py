"""The demo as a user runs it: one whole run without a network, the next one's name, and what is refused."""

import socket
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import wpmerge.demo
from wpmerge.demo import DemoResult, expert_instructions, family_path, run_demo
from wpmerge.errors import OutputError
from wpmerge.plan import load_plan
from wpmerge.scores import load_scores

INSTRUCTIONS = {
    "frame": ("detectable_format:multiple_sections", "startend:quotation"),
    "letters": ("change_case:english_capital", "punctuation:no_comma"),
    "marks": ("detectable_format:number_highlighted_sections", "detectable_format:title"),
}
MODELS = ["base", *INSTRUCTIONS, "uniform", "scaled", "fused"]

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def calls() -> list[str]:
    """Where connections and look-ups were attempted from while the demo ran."""
    return []


@pytest.fixture(scope="module")
def steps() -> list[str]:
    """What the run said that it was doing."""
    return []


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, calls: list[str], steps: list[str]) -> Iterator[DemoResult]:
    def refuse(*arguments: Any, **_: Any) -> None:
        calls.append(f"{arguments}\n{''.join(traceback.format_stack(limit=30))}")
        raise OSError("there is no network")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.chdir(tmp_path_factory.mktemp("demo"))
        yield run_demo(progress=lambda what, done, total: steps.append(what))


@pytest.fixture(scope="module")
def table(demo: DemoResult) -> list[list[str]]:
    return demo.table


@pytest.fixture(scope="module")
def kept(demo: DemoResult) -> dict[str, Any]:
    """Retention per model; its intervals take seconds."""
    return dict(demo.evaluation.retention())


def test_nothing_is_fetched(demo: DemoResult, calls: list[str]) -> None:
    assert demo.evaluation.models
    assert not calls, calls[0]


def test_the_table_has_a_row_per_model_and_a_column_per_instruction(
    demo: DemoResult, table: list[list[str]], kept: dict[str, Any]
) -> None:
    ids = [name for names in INSTRUCTIONS.values() for name in names]
    assert demo.instructions == INSTRUCTIONS
    assert demo.header == ["model", *(name.split(":")[1] for name in ids), "retention: mean", "least"]
    assert [row[0] for row in table] == MODELS
    for model, *cells in table:
        result = demo.evaluation.models[model]
        accuracies = [f"{result.scores[f'demo/inst_level_strict_acc/{name}'].value:.2f}" for name in ids]
        found = kept.get(model)
        assert (found is None) is (model == "base")
        ends = ["", ""] if found is None else [f"{found.mean.value:.2f}", f"{found.minimum.value:.2f}"]
        assert cells == accuracies + ends


def test_base_lacks_and_experts_have_their_skills(demo: DemoResult) -> None:
    for ids in INSTRUCTIONS.values():
        for name in ids:
            assert demo.evaluation.models["base"].scores[f"demo/inst_level_strict_acc/{name}"].value < 0.15, name
    for expert, ids in INSTRUCTIONS.items():
        for name in ids:
            assert demo.evaluation.models[expert].scores[f"demo/inst_level_strict_acc/{name}"].value > 0.9, name


def test_merges_keep_more_than_any_single_expert(demo: DemoResult, kept: dict[str, Any]) -> None:
    best = max(kept[expert].mean.value for expert in INSTRUCTIONS)
    assert best < 0.75
    for name in ("uniform", "scaled", "fused"):
        assert kept[name].mean.value > best
    assert len(set(demo.scales["uniform"].values())) == 1
    assert set(demo.scales["scaled"]) == set(INSTRUCTIONS)


def test_the_merge_keeps_more_than_its_rivals_beyond_chance(demo: DemoResult, kept: dict[str, Any]) -> None:
    for rival in ("uniform", "scaled"):
        assert kept["fused"].mean.low > kept[rival].mean.high
        assert kept["fused"].minimum.low > kept[rival].minimum.high


def test_every_artifact_is_on_disk_and_can_be_read_again(demo: DemoResult) -> None:
    assert sorted(path.name for path in demo.out.iterdir()) == [
        "evaluation", "merged", "report.html", "scaled", "scores", "uniform",
    ]  # fmt: skip
    assert (demo.out / "report.html").stat().st_size < 5_000_000
    scores = load_scores(demo.out / "scores")
    assert set(scores.experts) == set(INSTRUCTIONS)
    assert all(readout.gap > 0 for readout in scores.readouts.values())
    assert load_plan(demo.out / "merged").rule == "refine"
    uniform = load_plan(demo.out / "uniform")
    assert uniform.rule == "uniform"
    assert not list((demo.out / "uniform").glob("model*"))
    numbers = {float(c.values) for tensors in uniform.coefficients.values() for c in tensors.values()}
    assert numbers == {float(torch.tensor(demo.scales["uniform"]["frame"]))}
    assert (demo.out / "merged" / "model.safetensors").is_file()
    assert (demo.out / "evaluation" / "evaluation.json").is_file()


def test_a_second_run_takes_the_next_free_name(demo: DemoResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo.out.resolve().parent)
    assert demo.out.name == "wpmerge-demo"
    assert wpmerge.demo._free_name(Path("wpmerge-demo")).name == "wpmerge-demo-2"


def test_progress_says_what_is_done(demo: DemoResult, steps: list[str]) -> None:
    assert {"opening models", "choosing scales", "writing", "report"} < set(steps)
    assert any(what.startswith("evaluating fused") for what in steps)


def test_an_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="exists"):
        run_demo(out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    with pytest.raises(OutputError, match="lies inside an input"):
        run_demo(family_path() / "demo")
    assert not (family_path() / "demo").exists()


def test_the_experts_instructions_come_from_their_prompts() -> None:
    assert expert_instructions(family_path()) == INSTRUCTIONS
