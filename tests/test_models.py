"""Opening a base with its experts: what is refused, and that what runs is transformers' own model."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tinydisk import save_family, save_model, tiny_tokenizer

from wpmerge.errors import CheckpointError
from wpmerge.memory import Budget
from wpmerge.models import bounded, continuations, generation_model, load_tokenizer, open_family


def rewrite(directory: str, change: dict[str, torch.Tensor | None]) -> None:
    path = Path(directory) / "model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, path, metadata={"format": "pt"})


def refused(made: dict[str, str], expert: str = "e0") -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_family(made["base"], {"skill": made[expert]})
    return caught.value


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neox", "gpt2", "phi3"])
def test_an_opened_family_holds_the_weights_of_its_files(tmp_path: Path, model_type: str) -> None:
    made = save_family(tmp_path, model_type)
    family = open_family(made["base"], {"a": made["e0"], "b": made["e1"]})
    assert set(family.weights) == {"", "a", "b"}
    for seed, name in enumerate(("", "a", "b")):
        truth = dict(tiny_model(model_type, seed=seed).named_parameters())
        source = family.weights[name]
        found = dict(source.outer())
        for index in range(family.layout.layers):
            prefix = family.layout.layer_prefix(index)
            found |= {prefix + key: value for key, value in source.layer(index).items()}
        assert found.keys() == truth.keys()
        assert all(torch.equal(value, truth[key]) for key, value in found.items())


def test_an_expert_equal_to_the_base_is_refused(tmp_path: Path) -> None:
    made = save_family(tmp_path, experts=0)
    save_model(tmp_path / "e0", tiny_model("llama", seed=0))
    error = refused({**made, "e0": str(tmp_path / "e0")})
    assert "skill is the base itself" in error.what
    assert error.where == tmp_path / "e0"


def test_an_expert_that_differs_in_one_number_is_an_expert(tmp_path: Path) -> None:
    """Wherever that number lies: a hash of samples does not decide that two models are one."""
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    made = save_family(tmp_path, experts=0, **sizes)
    model = tiny_model("llama", seed=0, **sizes)
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.view(-1)[1200] += 1
    made["e0"] = str(save_model(tmp_path / "e0", model))
    family = open_family(made["base"], {"skill": made["e0"]})
    assert family.experts["skill"].content_hash() == family.base.content_hash(), "the sample does not show it"
    found = family.weights["skill"].layer(1)["mlp.up_proj.weight"] - family.weights[""].layer(1)["mlp.up_proj.weight"]
    assert found.nonzero().tolist() == [[1200 // 64, 1200 % 64]]


def test_models_of_two_kinds_are_refused(tmp_path: Path) -> None:
    made = save_family(tmp_path, "llama", experts=0)
    made["e0"] = str(save_model(tmp_path / "e0", tiny_model("mistral", seed=1)))
    error = refused(made)
    assert "skill is not of the base's family" in error.what
    assert "model_type is mistral, the base has llama" in str(error.got)


def test_an_unsupported_architecture_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    made = save_family(tmp_path)
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert "not supported" in refused(made).what


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({"model.layers.0.mlp.gate.weight": torch.zeros(3)}, "model.layers.0.mlp.gate.weight is not in the base"),
        ({"model.norm.weight": torch.zeros(8)}, "model.norm.weight has shape (8,), the base's (16,)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, torch.Tensor | None], got: str) -> None:
    made = save_family(tmp_path)
    rewrite(made["e0"], change)
    assert got in str(refused(made).got)


@pytest.mark.parametrize(
    "change", [{"model.layers.2.self_attn.q_proj.bias": None}, {"model.layers.0.mlp.gate.weight": torch.zeros(3)}]
)
def test_tensors_that_fit_each_other_but_not_the_config_are_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None]
) -> None:
    made = save_family(tmp_path, experts=1)
    for name in ("base", "e0"):
        rewrite(made[name], change)
    assert str(refused(made).where) in change


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    made = save_family(tmp_path)
    path = tmp_path / "e0/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w3"], vocabulary["w4"] = vocabulary["w4"], vocabulary["w3"]
    path.write_text(json.dumps(tokenizer))
    error = refused(made)
    assert "token 'w3' has id 12, in the base 11" in str(error.got)


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    made = save_family(tmp_path, experts=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).unlink()
    error = refused(made)
    assert "tokenizer" in error.what
    assert error.where == tmp_path / "base"
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_the_template_comes_from_the_base(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tiny_model("llama", seed=0), template=None)
    expert = save_model(tmp_path / "e0", tiny_model("llama", seed=1))
    family = open_family(str(base), {"skill": str(expert)})
    assert not family.chat.has_template
    assert family.chat.prompt_tokens("w3") == tiny_tokenizer().convert_tokens_to_ids(["Q:", "w3", "A:"])


def test_an_adapter_is_an_expert(tmp_path: Path) -> None:
    base = tiny_model("llama", seed=0)
    save_model(tmp_path / "base", base)
    torch.manual_seed(4)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    truth = adapted.merge_and_unload().model.layers[1].self_attn.q_proj.weight
    family = open_family(str(tmp_path / "base"), {"skill": str(tmp_path / "adapter")})
    found = family.weights["skill"].layer(1)
    torch.testing.assert_close(found["self_attn.q_proj.weight"], truth.detach())
    assert torch.equal(found["mlp.up_proj.weight"], family.weights[""].layer(1)["mlp.up_proj.weight"])


PROMPTS = ["w3 w4 w5", "w9", "w7 w8 w2 w1 w30 w31 w32", "w40 w41", "w12 w50"]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neox", "gpt2"])
def test_continuations_are_transformers_generate(tmp_path: Path, model_type: str) -> None:
    """Padded batches against one prompt at a time; one of the models is made to stop."""
    from transformers import AutoModelForCausalLM

    made = save_family(tmp_path, model_type, experts=1)
    if model_type == "gpt_neox":  # an end that comes soon: the head's row of <eos> points where others do
        head = load_file(tmp_path / "e0/model.safetensors")["embed_out.weight"]
        head[1] = head.abs().mean(dim=0) * head[9].sign() * 2
        rewrite(made["e0"], {"embed_out.weight": head})
    family = open_family(made["base"], {"skill": made["e0"]})
    found = continuations(family, "skill", PROMPTS, tokens=7)
    model = AutoModelForCausalLM.from_pretrained(made["e0"])
    for prompt, reply in zip(PROMPTS, found, strict=True):
        tokens = family.chat.prompt_tokens(prompt)
        run = model.generate(torch.tensor([tokens]), max_new_tokens=7, do_sample=False, pad_token_id=2)
        assert reply == run[0, len(tokens) :].tolist()
        assert 1 not in reply[:-1]
        assert len(reply) == 7 or reply[-1] == 1
    if model_type == "gpt_neox":
        assert any(len(reply) < 7 for reply in found), "some reply ended by itself"


def test_the_generating_model_shares_the_weights(tmp_path: Path) -> None:
    made = save_family(tmp_path, "llama", experts=1)
    family = open_family(made["base"], {"skill": made["e0"]})
    model = generation_model(family.engine, family.weights["skill"])
    weight = family.weights["skill"].layer(2)["mlp.down_proj.weight"]
    assert model.model.layers[2].mlp.down_proj.weight.data_ptr() == weight.data_ptr()
    assert model.lm_head.weight.data_ptr() == family.weights["skill"].outer()["model.embed_tokens.weight"].data_ptr()


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_streamed_continuations_are_the_resident_ones(tmp_path: Path, model_type: str) -> None:
    paths = save_family(tmp_path, model_type, experts=1)
    prompts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w4"]
    families = [open_family(paths["base"], {"e0": paths["e0"]}, resident=resident) for resident in (True, False)]
    families += [bounded(families[0], Budget(resident=resident, held_bytes=1)) for resident in (True, False)]
    assert [family.resident for family in families] == [True, False, True, False]
    for model in ("", "e0"):
        found = [continuations(family, model, prompts, tokens=7) for family in families]
        assert all(replies == found[0] for replies in found)
        assert all(1 <= len(reply) <= 7 for reply in found[0])
