"""Models in memory are the models that would be read from disk."""

import json
from pathlib import Path

import pytest
import torch
from families import write_family
from transformers import AutoModelForCausalLM

from wpmerge.errors import EvaluationError, RecipeError
from wpmerge.harness import HarnessSettings
from wpmerge.inmemory import check_plan_inputs, models_to_evaluate
from wpmerge.merging import merge, open_inputs
from wpmerge.plan import Coefficient, Plan, input_model

CPU = HarnessSettings(device="cpu")
TOKENS = torch.arange(3, 20)[None]


def write_plan(made: dict[str, Path], out: Path) -> Plan:
    from wpmerge.checkpoint import open_checkpoint

    opened = {name: open_checkpoint(path) for name, path in made.items()}
    base = opened.pop("base")
    scale = {name: Coefficient(values=torch.tensor(0.5)) for name in base.tensors}
    plan = Plan(
        base=input_model(base),
        experts={name: input_model(expert) for name, expert in opened.items()},
        coefficients=dict.fromkeys(opened, scale),
        rule="uniform",
        granularity="expert",
    )
    plan.save(out)
    return plan


def loaded(name: str, models: dict[str, str], plans: dict[str, str], settings: HarnessSettings = CPU, **more: object):
    found = models_to_evaluate(models, plans, **{"base": None, "inputs": {}, "settings": settings, **more})
    return found[name]()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_a_plan_in_memory_is_the_merge_on_disk(tmp_path: Path, kind: str) -> None:
    made = write_family(tmp_path, kind=kind)
    plan = write_plan(made, tmp_path / "plan")
    merge(plan, open_inputs(plan), tmp_path / "merged", sync=False)
    settings = json.loads((made["base"] / "generation_config.json").read_text()) | {"max_new_tokens": 7}
    (made["base"] / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = loaded("p", {}, {"p": str(tmp_path / "plan")})
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype is torch.bfloat16 and not model.training
    assert torch.equal(model(TOKENS).logits, written(TOKENS).logits)
    assert model.generation_config.max_new_tokens == 7
    assert tokenizer("w3 w5")["input_ids"] == [3, 5]


def test_the_dtype_may_be_another(tmp_path: Path) -> None:
    write_plan(write_family(tmp_path), tmp_path / "plan")
    settings = HarnessSettings(device="cpu", dtype="float32")
    assert loaded("p", {}, {"p": str(tmp_path / "plan")}, settings)[0].dtype is torch.float32


def test_inputs_of_a_plan_may_live_elsewhere(tmp_path: Path) -> None:
    made = write_family(tmp_path)
    write_plan(made, tmp_path / "plan")
    made["a"].rename(tmp_path / "moved")
    plans = {"p": str(tmp_path / "plan")}
    model, _ = loaded("p", {}, plans, inputs={"a": str(tmp_path / "moved")})
    assert model(TOKENS).logits.isfinite().all()
    with pytest.raises(RecipeError, match="b is not the checkpoint"):
        models_to_evaluate(
            {}, plans, base=None, inputs={"a": str(tmp_path / "moved"), "b": str(tmp_path / "moved")}, settings=CPU
        )
    check_plan_inputs({"a": "x", "base": "y"}, [tmp_path / "plan"])
    with pytest.raises(EvaluationError, match="no plan has such an input"):
        check_plan_inputs({"c": "x"}, [tmp_path / "plan"])


def test_an_adapter_is_applied_to_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    made = write_family(tmp_path, ())
    base = AutoModelForCausalLM.from_pretrained(made["base"], dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    models = {"b": str(made["base"]), "x": str(tmp_path / "adapter")}
    model, _ = loaded("x", models, {}, HarnessSettings(device="cpu"), base="b")
    merged = adapted.merge_and_unload().to(torch.bfloat16)
    assert model.dtype is torch.bfloat16
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0.01, atol=1e-3)  # a rounding apart at most
    plain = AutoModelForCausalLM.from_pretrained(made["base"])
    assert not torch.equal(model.state_dict()[UP], plain.state_dict()[UP])


def test_an_adapter_on_a_base_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    made = write_family(tmp_path, ())
    base = AutoModelForCausalLM.from_pretrained(made["base"], dtype=torch.float32)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    weights = made["base"] / "model.safetensors"
    tensors = load_file(weights)
    del tensors[UP]
    save_file(tensors, weights, metadata={"format": "pt"})
    models = {"b": str(made["base"]), "x": str(tmp_path / "adapter")}
    with pytest.raises(EvaluationError, match=rf"lacks tensors(.|\n)*no {UP}"):
        loaded("x", models, {}, base="b")


UP = "model.layers.0.mlp.up_proj.weight"


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    made = write_family(tmp_path, ())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    both = {"b": str(made["base"]), "x": str(tmp_path / "adapter")}
    for base in (None, "x", "y"):
        with pytest.raises(EvaluationError, match="a LoRA adapter alone is no model"):
            models_to_evaluate(both, {}, base=base, inputs={}, settings=CPU)
    with pytest.raises(EvaluationError, match="the same name"):
        models_to_evaluate({"b": "x"}, {"b": "y"}, base=None, inputs={}, settings=CPU)
    with pytest.raises(EvaluationError, match="in memory"):
        models_to_evaluate({}, {"p": "y"}, base=None, inputs={}, settings=HarnessSettings(backend="vllm"))
    with pytest.raises(RecipeError, match="a plan cannot be read"):
        models_to_evaluate({}, {"p": str(tmp_path / "nowhere")}, base=None, inputs={}, settings=CPU)
