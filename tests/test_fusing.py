"""``fuse`` from scores on disk to merged checkpoints on disk, against the definitions in float64."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_family, write_prompts
from safetensors.torch import load_file, save_file
from torch import Tensor

from wpmerge import refining
from wpmerge.calibration import GRID, retention, utility
from wpmerge.checkpoint import open_checkpoint
from wpmerge.errors import CapabilityError, CheckpointError, OutputError, RecipeError, WpmergeError
from wpmerge.fusing import FuseResult, FuseSettings, fuse
from wpmerge.memory import Budget
from wpmerge.models import Family, open_family
from wpmerge.plan import load_plan
from wpmerge.scores import Scores, load_scores
from wpmerge.scoring import ScoreSettings, score
from wpmerge.tuning import held_out_readings

SETTINGS = ScoreSettings(
    readouts=("reference",), prompts=6, held_out=6, reference_tokens=6, top=0, sample=0, accept_anchor=True
)
GIVEN = {"a": 0.5, "b": 0.8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disk:
    """A scored family: models by name, and where the scores lie."""

    root: Path
    models: dict[str, Path]
    scores: Path

    def fuse(self, out: Path, *, rule: str = "scaled", **options: Any) -> FuseResult:
        names = {field.name for field in dataclasses.fields(FuseSettings)}
        chosen = {name: options.pop(name) for name in list(options) if name in names}
        return fuse(self.scores, out, settings=FuseSettings(rule=rule, **chosen), **options)

    def open(self) -> Family:
        return open_family(str(self.models["base"]), {name: str(self.models[name]) for name in ("a", "b")})

    def copy(self, root: Path) -> "Disk":
        """The same elsewhere, with scores that know it."""
        shutil.copytree(self.root, root)
        text = (root / "scores" / "scores.json").read_text().replace(str(self.root), str(root))
        (root / "scores" / "scores.json").write_text(text)
        return Disk(root=root, models={n: root / p.name for n, p in self.models.items()}, scores=root / "scores")


def make_disk(root: Path, kind: str = "llama", settings: ScoreSettings = SETTINGS) -> Disk:
    models = write_family(root, kind=kind)
    capabilities = {name: str(write_prompts(root / f"{name}.jsonl", seed=seed)) for seed, name in enumerate(("a", "b"))}
    experts = {name: str(models[name]) for name in ("a", "b")}
    score(base=str(models["base"]), experts=experts, capabilities=capabilities, out=root / "scores", settings=settings)
    return Disk(root=root, models=models, scores=root / "scores")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return make_disk(tmp_path_factory.mktemp("fusing") / "family")


@pytest.fixture(scope="module")
def chosen(disk: Disk, tmp_path_factory: pytest.TempPathFactory) -> FuseResult:
    """Rule scaled, scales chosen on the held-out prompts."""
    return disk.fuse(tmp_path_factory.mktemp("chosen") / "merged")


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def ulps(one: Tensor, other: Tensor) -> Tensor:
    return (one.contiguous().view(torch.int16).int() - other.contiguous().view(torch.int16).int()).abs()


def assert_merged(disk: Disk, out: Path, factors: dict[str, dict[str, Tensor | float]]) -> None:
    """The merged tensors are base + Σ factor · delta in float64, rounded once to bfloat16."""
    models = {name: weights(path) for name, path in disk.models.items()}
    merged, differ = weights(out), 0
    assert merged.keys() == models["base"].keys()
    for name, base in models["base"].items():
        total = base.double()
        for expert, each in factors.items():
            total = total + each[name] * (models[expert][name].double() - base.double())
        largest = torch.stack([tensors[name].abs() for tensors in models.values()]).amax(dim=0).double()
        error = (merged[name].double() - total).abs()
        assert (error <= total.abs() * 2**-8 + largest * 1e-6).all(), name  # half a bfloat16 step, and float32's sum
        differ += int((merged[name] != total.float().bfloat16()).sum())
    assert differ <= 0.004 * sum(tensor.numel() for tensor in merged.values())  # float32 takes near ties the other way


def by_hand(disk: Disk, scores: Scores, scales: dict[str, float]) -> dict[str, dict[str, Tensor]]:
    """Rule proportional at the finest units with p = ½ and two experts, straight from the formula; stored names."""
    layout = disk.open().layout
    factors = {name: {t: torch.full(s, torch.nan).double() for t, s in layout.shapes.items()} for name in scales}
    for kind in layout.counts:
        arrays = {name: scores.array(name, name, kind).double() for name in scales}
        for unit in layout.units(kind):
            positive = {name: max(float(array[unit.layer, unit.index]), 0.0) for name, array in arrays.items()}
            total = sum(value**0.5 for value in positive.values())
            for name, scale in scales.items():
                share = 2 * positive[name] ** 0.5 / total if total else 1.0
                for piece in layout.slices(unit):
                    part = factors[name][piece.tensor]
                    if piece.axis is not None:
                        part = part.narrow(piece.axis, piece.start, piece.stop - piece.start)
                    part.fill_(min(1.5, scale * share))
    return {name: {layout.stored[t]: factor for t, factor in each.items()} for name, each in factors.items()}


@pytest.mark.parametrize("kind", ["phi3", "gpt_neox", "gpt2"])
def test_fused_tensors_are_merged_unit_by_unit(tmp_path: Path, kind: str) -> None:
    own = make_disk(tmp_path / "own", kind=kind)
    own.fuse(tmp_path / "out", rule="proportional", scales=GIVEN)
    assert_merged(own, tmp_path / "out", by_hand(own, load_scores(own.scores), GIVEN))


def test_the_merged_checkpoint_is_what_the_formula_says(disk: Disk, tmp_path: Path) -> None:
    result = disk.fuse(tmp_path / "out", rule="proportional", scales=GIVEN)
    factors = by_hand(disk, load_scores(disk.scores), GIVEN)
    assert_merged(disk, tmp_path / "out", factors)
    assert len({float(value) for value in factors["a"]["model.layers.1.mlp.down_proj.weight"].unique()}) > 5
    assert (result.plan.rule, result.plan.granularity) == ("proportional", "unit")
    assert result.retention == {}
    assert result.scales == GIVEN
    assert result.summary is not None
    assert result.summary.out == tmp_path / "out"


def test_the_merged_checkpoint_loads_and_generates(disk: Disk, chosen: FuseResult) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(chosen.out)
    assert model.dtype == torch.bfloat16
    stored = weights(chosen.out)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name]), name
    tokenizer = AutoTokenizer.from_pretrained(chosen.out)
    tokens = tokenizer("w5 w6 w7", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=3, min_new_tokens=3).shape == (1, 6)
    present = {path.name for path in chosen.out.iterdir()}
    papers = {"plan.json", "plan.safetensors", "recipe.yml", "README.md", "config.json", "generation_config.json"}
    assert papers | {"model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= present


def test_chosen_scales_are_the_best_of_those_tried(disk: Disk, chosen: FuseResult) -> None:
    assert (chosen.plan.rule, chosen.plan.granularity) == ("scaled", "expert")
    assert chosen.scales.keys() == chosen.retention.keys() == {"a", "b"}
    assert_merged(
        disk,
        chosen.out,
        {name: dict.fromkeys(weights(chosen.out), float(torch.tensor(s))) for name, s in chosen.scales.items()},
    )
    found = measured(disk, chosen.out)
    for name, value in chosen.retention.items():  # of the merge before it was rounded to bfloat16
        assert found[name] == pytest.approx(value, abs=0.05)
    provenance = load_plan(chosen.out).provenance
    assert provenance["scales"] == chosen.scales
    assert provenance["held_out_retention"] == chosen.retention


def measured(disk: Disk, merged: Path) -> dict[str, float]:
    """Retention of a merged checkpoint on the held-out prompts, with the checkpoint opened as one more expert."""
    models = {name: str(disk.models[name]) for name in ("a", "b")} | {"merged": str(merged)}
    family, scores = open_family(str(disk.models["base"]), models), load_scores(disk.scores)
    readings = held_out_readings(family, scores, ["a", "b"])
    return retention(family.engine, family.weights["merged"], readings)


@pytest.mark.parametrize("rule", ["scaled", "refine"])
def test_a_bound_on_memory_changes_no_more_than_rounding(
    disk: Disk, tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"rule": rule, "steps": 2, "batch": 3, "evaluations": 4, "plan_only": True}
    free, roomy = (disk.fuse(tmp_path / str(most), max_memory=most, **asked) for most in (None, 64 << 30))
    monkeypatch.setattr("wpmerge.fusing.merging_budget", lambda *_, **__: Budget(resident=False, held_bytes=1))
    tight = disk.fuse(tmp_path / "tight", max_memory=1, **asked)
    for name, tensors in free.plan.coefficients.items():
        for tensor, coefficient in tensors.items():
            torch.testing.assert_close(roomy.plan.coefficients[name][tensor].values, coefficient.values)
            found = tight.plan.coefficients[name][tensor].values
            torch.testing.assert_close(found, coefficient.values, rtol=1e-3, atol=1e-4)
    assert tight.plan.provenance["settings"]["max_memory"] == 1


def test_what_does_not_fit_is_refused_before_any_run(disk: Disk, tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(WpmergeError, match="fusing does not fit into --max-memory") as caught:
        disk.fuse(tmp_path / "out", rule="refine", max_memory=1 << 20, progress=lambda name, *_: seen.append(name))
    assert "at least" in str(caught.value.expected) and not seen and not (tmp_path / "out").exists()
    disk.fuse(tmp_path / "out", rule="uniform", scales={"": 0.5}, max_memory=1 << 20, plan_only=True)  # runs nothing


def test_held_out_prompts_were_not_scored_on(disk: Disk) -> None:
    for record in load_scores(disk.scores).capabilities.values():
        assert len(record.held_out.prompts) == 6
        assert not set(record.held_out.prompts) & set(record.scored)


def test_uniform_has_one_scale_and_keeps_to_its_evaluations(disk: Disk, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = disk.fuse(
        tmp_path / "out", rule="uniform", evaluations=3, plan_only=True, progress=lambda *step: seen.append(step)
    )
    assert result.scales["a"] == result.scales["b"] in GRID[:3]
    assert [step for step in seen if step[0] == "choosing scales"] == [("choosing scales", n, 3) for n in range(4)]
    tried = {
        scale: disk.fuse(tmp_path / f"out{scale}", rule="uniform", scales={"": scale}, max_coefficient=1.0)
        for scale in GRID[:3]
    }
    utilities = {scale: utility(measured(disk, found.out)) for scale, found in tried.items()}
    assert max(utilities, key=utilities.__getitem__) == result.scales["a"]


def test_plan_only_writes_no_weights(disk: Disk, tmp_path: Path) -> None:
    result = disk.fuse(tmp_path / "out", rule="select", scales={"": 0.6}, plan_only=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plan.json", "plan.safetensors", "recipe.yml"]
    assert result.summary is None
    plan = load_plan(tmp_path / "out")
    assert plan.coefficients.keys() == {"a", "b"}
    values = torch.cat([c.values.reshape(-1) for c in plan.coefficients["a"].values()])
    assert set(values.unique().tolist()) == {float(torch.tensor(0.6)), float(torch.tensor(0.6 * 0.3))}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("scales", "expected"),
    [({"": 0.4}, {"a": 0.4, "b": 0.4}), ({"": 0.4, "b": 1}, {"a": 0.4, "b": 1.0}), (GIVEN, GIVEN)],
)
def test_given_scales_are_taken_as_they_are(
    disk: Disk, tmp_path: Path, scales: dict[str, float], expected: dict[str, float]
) -> None:
    result = disk.fuse(tmp_path / "out", scales=scales, plan_only=True)
    assert result.scales == expected
    for name, tensors in load_plan(tmp_path / "out").coefficients.items():
        assert {float(coefficient.values) for coefficient in tensors.values()} == {float(torch.tensor(expected[name]))}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"scales": {"c": 0.5, "": 0.5}}, "names an unknown expert"),
        ({"scales": {"a": 0.5}}, "leaves an expert out"),
        ({"scales": {"": 1.6}}, "the scale of a is out of range"),
        ({"scales": {"a": 0.5, "b": -0.1}}, "the scale of b is out of range"),
        ({"scales": {"": float("nan")}}, "out of range"),
        ({"scales": {"": 0.5}, "max_coefficient": 0.4}, "out of range"),
        ({"scales": GIVEN, "rule": "uniform"}, "one scale for all"),
        ({"rule": "select", "density": 1.2}, "density is out of range"),
        ({"rule": "select", "granularity": "expert"}, "nothing to select among"),
        ({"evaluations": 0}, "at least one evaluation"),
        ({"models": {"c": "x"}}, "no such model"),
        ({"models": {"a": "./absent"}}, "no such checkpoint|neither a directory"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    disk: Disk, tmp_path: Path, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(WpmergeError, match=complaint):
        disk.fuse(tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_inputs_may_have_moved_but_must_be_the_same(disk: Disk, tmp_path: Path) -> None:
    own = disk.copy(tmp_path / "own")
    moved = own.models["a"].rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        own.fuse(tmp_path / "out", scales=GIVEN)
    own.fuse(tmp_path / "out", scales=GIVEN, models={"a": str(moved)})
    recorded = load_plan(tmp_path / "out").experts["a"]
    assert recorded.source == str(moved)
    disk.fuse(tmp_path / "same", scales=GIVEN)
    for name, tensor in weights(tmp_path / "same").items():
        assert torch.equal(tensor, weights(tmp_path / "out")[name])
    with pytest.raises(RecipeError, match="a is not the checkpoint that was scored"):
        own.fuse(tmp_path / "third", scales=GIVEN, models={"a": str(own.models["b"])})
    changed = weights(moved)
    changed["model.norm.weight"] += 1
    save_file(changed, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="a is not the checkpoint that was scored"):
        own.fuse(tmp_path / "third", scales=GIVEN, models={"a": str(moved)})
    assert not (tmp_path / "third").exists()


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("out", "complaint"),
    [
        ("scores", "is an input"),
        ("scores/merged", "lies inside an input"),
        ("b", "not an output"),
        ("base/merged", "lies inside an input"),
        (".", "contains an input"),
    ],
)
@pytest.mark.parametrize("plan_only", [False, True])
def test_an_output_over_an_input_is_refused_before_any_work(
    disk: Disk, out: str, complaint: str, plan_only: bool
) -> None:
    before, steps = tree(disk.root), []
    with pytest.raises(OutputError, match=complaint):
        disk.fuse(disk.root / out, overwrite=True, plan_only=plan_only, progress=lambda *step: steps.append(step))
    assert steps == []
    assert tree(disk.root) == before


def counted(runs: list[str], name: str, real: Any, *args: Any, **options: Any) -> Any:
    """Call a function, and say that it ran."""
    runs.append(name)
    return real(*args, **options)


@pytest.mark.parametrize(
    "at",
    [
        ("choosing scales", 2),
        ("refining", 2),
        ("keeping to the retain sets", 2),
    ],
)
def test_an_interrupted_fusion_goes_on_and_ends_in_the_same_bytes(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: tuple[str, int]
) -> None:
    capabilities = {name: str(disk.root / f"{name}.jsonl") for name in ("a", "b")}
    experts = {name: str(disk.models[name]) for name in ("a", "b")}
    retain = {"plain": str(write_prompts(tmp_path / "plain.jsonl", seed=7))}
    scores = tmp_path / "scores"
    base = str(disk.models["base"])
    score(base=base, experts=experts, capabilities=capabilities, retain=retain, out=scores, settings=SETTINGS)
    settings = FuseSettings(rule="refine", steps=3, batch=2, tolerance=1e-4)
    runs: list[str] = []
    for name in ("directional_sum", "assess"):
        real = getattr(refining, name)
        monkeypatch.setattr(refining, name, partial(counted, runs, name, real))
    whole = fuse(scores, tmp_path / "whole", settings=settings, plan_only=True)
    assert whole.outcome.factors
    all_runs = runs.copy()
    runs.clear()

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuse(scores, tmp_path / "out", settings=settings, plan_only=True, progress=stop)
    assert not (tmp_path / "out").exists() and runs
    before = len(runs)
    fuse(scores, tmp_path / "out", settings=settings, plan_only=True)
    assert sorted(runs) == sorted(all_runs), "nothing was read twice, and nothing left out"
    assert before < len(runs)
    for name in ("plan.safetensors", "recipe.yml"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain.jsonl", "scores", "whole"]


def test_what_an_interrupted_fusion_left_is_of_no_use_to_another(disk: Disk, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("refining", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk.fuse(tmp_path / "out", rule="refine", steps=2, batch=2, plan_only=True, progress=stop)
    kept = tmp_path / ".out.wpmerge-work" / "out" / "pieces"
    assert any(kept.glob("slopes-*")) and any(kept.glob("stood-*")) and any(kept.glob("scored-*"))
    other = disk.fuse(tmp_path / "out", rule="refine", steps=2, batch=2, ridge=0.1, plan_only=True)
    fresh = disk.fuse(tmp_path / "fresh", rule="refine", steps=2, batch=2, ridge=0.1, plan_only=True)
    assert torch.equal(other.outcome.values, fresh.outcome.values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]


def test_an_output_that_cannot_be_written_keeps_what_was_found(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OutputError("the output could not be written: No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):
        patch.setattr("wpmerge.fusing.merge", full)
        disk.fuse(tmp_path / "out", rule="refine", steps=2, batch=2)
    assert any((tmp_path / ".out.wpmerge-work" / "out" / "pieces").glob("slopes-*"))
    monkeypatch.setattr(refining, "directional_sum", full)
    disk.fuse(tmp_path / "out", rule="refine", steps=2, batch=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_hold_the_output_is_refused_before_any_work(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    steps: list[Any] = []
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(OutputError, match="cannot write beside"):
            disk.fuse(out, progress=lambda *step: steps.append(step))
    assert steps == []


def test_an_output_that_exists_is_kept_or_replaced_whole(disk: Disk, tmp_path: Path) -> None:
    disk.fuse(tmp_path / "out", scales={"": 0.5}, plan_only=True)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="exists"):
        disk.fuse(tmp_path / "out", scales={"": 0.7})
    with pytest.raises(RecipeError, match="unknown expert"):
        disk.fuse(tmp_path / "out", scales={"x": 0.7}, overwrite=True)
    assert tree(tmp_path) == before
    disk.fuse(tmp_path / "out", scales={"": 0.7}, overwrite=True)
    assert load_plan(tmp_path / "out").provenance["scales"] == {"a": 0.7, "b": 0.7}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="refused to replace"):
        disk.fuse(tmp_path / "mine", scales={"": 0.7}, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_too_little_disk_is_found_before_scales_are_chosen(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    steps: list[Any] = []
    with pytest.raises(OutputError, match="not enough disk space"):
        disk.fuse(tmp_path / "out", progress=lambda *step: steps.append(step))
    assert steps == []
    assert not list(tmp_path.iterdir())


def test_an_expert_that_is_no_better_on_held_out_prompts_is_refused(disk: Disk, tmp_path: Path) -> None:
    """Held-out references that the base itself wrote: it gives them more probability than the expert does."""
    from transformers import AutoModelForCausalLM

    own = disk.copy(tmp_path / "own")
    record = json.loads((own.scores / "scores.json").read_text())
    held = record["capabilities"]["b"]["held_out"]
    family = own.open()
    heads = [family.chat.prompt_tokens(prompt) for prompt in held["prompts"]]
    model = AutoModelForCausalLM.from_pretrained(own.models["base"], dtype=torch.float32)
    held["sequences"] = [
        model.generate(torch.tensor([head]), max_new_tokens=6, do_sample=False)[0].tolist() for head in heads
    ]
    (own.scores / "scores.json").write_text(json.dumps(record))
    with pytest.raises(CapabilityError, match="the expert b is no better than the base"):
        own.fuse(tmp_path / "out")
    own.fuse(tmp_path / "out", scales=GIVEN, plan_only=True)


def test_kinds_that_were_not_scored_take_the_scale(tmp_path: Path) -> None:
    own = make_disk(tmp_path / "own", settings=dataclasses.replace(SETTINGS, kinds=("head",)))
    result = own.fuse(tmp_path / "out", rule="proportional", scales=GIVEN, plan_only=True)
    for name, tensors in result.plan.coefficients.items():
        for tensor, coefficient in tensors.items():
            of_heads = "q_proj" in tensor or "o_proj" in tensor
            same = bool((coefficient.values == torch.tensor(GIVEN[name])).all())
            assert same is not of_heads, tensor


def test_a_recipe_at_granularity_tensor_is_the_merge_in_mergekit(disk: Disk, tmp_path: Path) -> None:
    disk.fuse(tmp_path / "ours", rule="proportional", granularity="tensor", scales=GIVEN)
    program = Path(sys.executable).with_name("mergekit-yaml")
    command = [str(program), str(tmp_path / "ours" / "recipe.yml"), str(tmp_path / "theirs")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    ours, theirs = (open_checkpoint(tmp_path / name) for name in ("ours", "theirs"))
    assert list(ours.tensors) == list(theirs.tensors)
    numbers = load_plan(tmp_path / "ours").coefficients["a"]
    assert len({float(coefficient.values) for coefficient in numbers.values()}) > 5
    for name in ours.tensors:
        assert ulps(ours.load(name), theirs.load(name)).max() == 0, name


@pytest.mark.parametrize("retain", [False, True])
def test_scores_without_an_experts_capability_are_refused(disk: Disk, tmp_path: Path, retain: bool) -> None:
    other = disk.copy(tmp_path / "family")
    header = json.loads((other.scores / "scores.json").read_text())
    if retain:
        header["capabilities"]["a"]["retain"] = True
    else:
        del header["capabilities"]["a"]
    (other.scores / "scores.json").write_text(json.dumps(header))
    with pytest.raises(RecipeError, match="no capability of an expert"):
        other.fuse(tmp_path / "out")
