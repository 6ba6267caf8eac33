"""What inspect says of every kind of directory, against what was put there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LAYERS, family, llama_shapes
from families import write_family

from wpmerge.arch import KINDS
from wpmerge.console import print_table
from wpmerge.errors import WpmergeError
from wpmerge.evaluation import Evaluation, ModelResult, Skill, score_of, to_json
from wpmerge.inspecting import inspect, inspection_tables
from wpmerge.plan import Coefficient, InputModel, Plan
from wpmerge.scores import ReadoutRecord, Scores, Verification, Verified

HASH = "sampled-sha256:0"
MODEL = InputModel(source="somewhere", content_hash=HASH)


def shown(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    for table in inspection_tables(found):
        print_table(table)
    return capsys.readouterr().out


def make_scores() -> Scores:
    heads = torch.tensor([[0.1, -0.5], [0.3, float("nan")]])
    unit = Verified(unit="head.0.1", drawn="top", screen=-0.5, exact=-0.4, stderr=0.1)
    found = Verification(
        units=(unit,), spearman=0.9, spearman_random=None, recall=1.0, largest_error=None, missed_share=0.2
    )
    record = ReadoutRecord(
        capability="e",
        readout="reference",
        l_star=1,
        base=-2.0,
        expert=-1.5,
        gap=0.5,
        gap_t=7.25,
        noise_floor=1e-6,
        prompts=8,
        verification={"sufficiency": {"head": found}},
    )
    return Scores(
        base=MODEL,
        experts={"e": MODEL},
        model_type="llama",
        layers=2,
        counts={"head": 2, "norm": 1},
        labels={"norm": ["input_layernorm"]},
        capabilities={},
        readouts={"e": record},
        arrays={"linear/e/e/head": heads, "linear/e/e/norm": torch.tensor([[0.25], [0.125]])},
        provenance={"seconds": 1.5, "settings": {"prompts": 8}, "versions": {"torch": "2"}},
    )


def test_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_scores().save(tmp_path)
    found = inspect(str(tmp_path / "scores.json"), top=2)
    record = found["scores"]["readouts"]["e"]
    assert (found["kinds"], found["scores"]["estimators"]) == (["scores"], ["linear"])
    assert (record["gap"], record["unit"], record["gap_t"]) == (0.5, "nats per token", 7.25)
    head = record["kinds"]["head"]
    assert (head["units"], head["scored"], head["verified"], head["spearman"], head["recall"]) == (4, 3, 1, 0.9, 1.0)
    # the largest by size come first, and what was verified says so
    assert [(e["unit"], round(e["recovery"], 6), e["exact"]) for e in head["strongest"]] == [
        ("head.0.1", -0.5, -0.4),
        ("head.1.0", 0.3, None),
    ]
    assert record["kinds"]["norm"]["strongest"][0] == {
        "unit": "norm.0.0",
        "name": "input_layernorm",
        "recovery": 0.25,
        "screen": None,
        "exact": None,
    }
    text = shown(found, capsys)
    assert "e: reference, l* 1, gap 0.5 nats per token, t 7.25, noise floor 1e-06 of the gap" in text
    assert "norm.0.0 (input_layernorm)" in text and "setting prompts" in text


def test_no_more_units_are_shown_than_have_a_score(tmp_path: Path) -> None:
    make_scores().save(tmp_path)
    record = inspect(str(tmp_path), top=99)["scores"]["readouts"]["e"]
    assert [len(record["kinds"][kind]["strongest"]) for kind in ("head", "norm")] == [3, 2]


def test_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vector = Coefficient(values=torch.tensor([0.5, 1.0]), axis=0)
    coefficients = {"e": {"w": vector, "v": Coefficient(values=torch.tensor(0.25))}}
    plan = Plan(base=MODEL, experts={"e": MODEL}, coefficients=coefficients, rule="select", granularity="unit")
    plan.save(tmp_path)
    found = inspect(str(tmp_path))
    entry = found["plan"]["experts"]["e"]
    assert (entry["least"], entry["greatest"], entry["mean_over_tensors"]) == (0.25, 1.0, 0.5)
    assert (entry["tensors"], entry["vectors"]) == (2, 1)
    assert "rule select, granularity unit" in shown(found, capsys)


def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = family(tmp_path, experts=1, shards=2)
    found = inspect(str(made["e0"]))
    entry, shapes = found["checkpoint"], llama_shapes()
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert (entry["parameters"], entry["bytes"]) == (parameters, 2 * parameters)
    assert entry["parameters_by_dtype"] == {"bfloat16": parameters}
    assert {name: tuple(each["shape"]) for name, each in entry["tensors"].items()} == shapes
    assert entry["units"] == {
        "head": 4 * LAYERS,
        "neuron": 24 * LAYERS,
        "kv_group": 2 * LAYERS,
        "norm": 2 * LAYERS,
        "embedding": 1,
        "final_norm": 1,
        "lm_head": 1,
    }
    assert set(entry["units"]) <= set(KINDS)
    assert set(found["files"]) >= {"config.json", "model-00001-of-00002.safetensors"}
    rows = [line.split() for line in shown(found, capsys).splitlines()]
    assert ["model.layers.*.mlp.up_proj.weight", "2", "bfloat16", "24", "×", "16"] in rows


def test_an_architecture_without_units_is_still_described(tmp_path: Path) -> None:
    made = family(tmp_path, experts=0)["base"]
    config = json.loads((made / "config.json").read_text()) | {"model_type": "mpt"}
    (made / "config.json").write_text(json.dumps(config))
    entry = inspect(str(made))["checkpoint"]
    assert set(entry["units"]) == {"unknown"} and entry["parameters"] > 0


def test_an_adapter_needs_no_base_to_be_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(write_family(tmp_path, ())["base"])
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    found = inspect(str(tmp_path / "adapter"))
    entry = found["adapter"]
    assert (found["kinds"], entry["r"], entry["lora_alpha"], entry["target_modules"]) == (["adapter"], 2, 8, ["q_proj"])
    assert entry["parameters"] == 3 * (2 * 16 + 16 * 2)  # three layers, down and up
    assert "lora alpha" in shown(found, capsys)


def test_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def result(*credits: int) -> ModelResult:
        rows = [[each] for each in credits]
        return ModelResult(
            source="x",
            chat_template=None,
            batch_size=1,
            truncated=0,
            seconds=1.0,
            scores={"t/acc": score_of(rows)},
            credits={"t/acc": rows},
        )

    evaluation = Evaluation(
        models={"base": result(0, 0), "expert": result(1, 1), "merge": result(1, 0)},
        documents={"t": ["0", "1"]},
        instructions={},
        reference="base",
        base="base",
        skills={"expert": Skill(expert="expert", metric="t/acc")},
    )
    (tmp_path / "evaluation.json").write_text(to_json(evaluation))
    found = inspect(str(tmp_path))
    entry = found["evaluation"]
    assert entry["models"]["merge"]["t/acc"]["value"] == 0.5
    assert entry["differences"]["expert"]["t/acc"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert entry["retention"]["merge"]["mean"]["value"] == 0.5
    text = shown(found, capsys)
    assert "0.500 ± " in text and "+1.000 [+1.000, +1.000]" in text and "retention" in text


def test_what_is_unknown_is_said(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(WpmergeError, match="nothing here that wpmerge knows") as caught:
        inspect(str(tmp_path))
    assert (caught.value.where, caught.value.got) == (tmp_path, "notes.txt")
    with pytest.raises(WpmergeError, match="no such checkpoint directory"):
        inspect(str(tmp_path / "no" / "where" / "at" / "all"))


def test_both_directions_and_their_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = make_scores()
    back = torch.tensor([[0.2, 0.25], [0.1, float("nan")]])
    replace(scores, arrays={**scores.arrays, "linear-necessity/e/e/head": back}).save(tmp_path)
    found = inspect(str(tmp_path))
    strongest = found["scores"]["readouts"]["e"]["necessity"]["head"]["strongest"][0]
    assert (strongest["unit"], strongest["recovery"], strongest["sufficiency"]) == ("head.0.1", 0.25, -0.5)
    assert strongest["difference"] == 0.75
    text = shown(found, capsys)
    assert "e: necessity" in text and "0.75" in text


def test_a_retain_set_says_its_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = make_scores()
    record = ReadoutRecord(
        capability="plain", readout="reference", l_star=1, base=-0.75, expert=None, gap=None, gap_t=None, prompts=8
    )
    arrays = {**scores.arrays, "linear/plain/e/head": torch.tensor([[-0.02, 0.0], [0.01, 0.0]])}
    replace(scores, readouts={**scores.readouts, "plain": record}, arrays=arrays).save(tmp_path)
    text = shown(inspect(str(tmp_path)), capsys)
    assert "plain: reference, l* 1, retain set, -0.75 nats per token in the base" in text
    assert "-0.02" in text
