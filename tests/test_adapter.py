import json
import math

import pytest
import safetensors.torch
import torch
from checkpoints import CONFIG, llama_shapes, random_weights, write_checkpoint

from wpmerge.checkpoint import check_same_family, open_checkpoint
from wpmerge.dtypes import Dtype
from wpmerge.errors import CheckpointError

RANK = 3
CONFIG_LORA = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"


def factors(module, rows, columns, rank=RANK, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.{module}.lora_A.weight": torch.randn(rank, columns, generator=generator),
        f"base_model.model.{module}.lora_B.weight": torch.randn(rows, rank, generator=generator),
    }


def write_adapter(path, tensors, **config):
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(CONFIG_LORA | config))
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.fixture
def base(tmp_path):
    return open_checkpoint(write_checkpoint(tmp_path / "base", random_weights(0, llama_shapes())))


def product(tensors, module):
    return tensors[f"base_model.model.{module}.lora_B.weight"] @ tensors[f"base_model.model.{module}.lora_A.weight"]


def test_touched_tensors_are_base_plus_scaled_product(tmp_path, base):
    tensors = factors(UP, 24, 16)
    adapted = open_checkpoint(write_adapter(tmp_path / "a", tensors), base=base)
    expected = base.load(f"{UP}.weight").float() + 2.0 * product(tensors, UP)
    assert adapted.tensors[f"{UP}.weight"].dtype is Dtype.F32
    torch.testing.assert_close(adapted.load(f"{UP}.weight"), expected, rtol=1e-6, atol=1e-6)
    for name in base.tensors:
        if name != f"{UP}.weight":
            assert torch.equal(adapted.load(name), base.load(name))
            assert adapted.tensors[name].dtype is Dtype.BF16
    assert list(adapted.tensors) == list(base.tensors)
    check_same_family(base, adapted, name="a")
    assert adapted.content_hash() != base.content_hash()


def test_a_blocks_bits_do_not_depend_on_its_bounds(tmp_path):
    generator = torch.Generator().manual_seed(1)
    wide = {"x.weight": torch.randn(300, 700, generator=generator)}
    base = open_checkpoint(write_checkpoint(tmp_path / "base", wide))
    adapted = open_checkpoint(write_adapter(tmp_path / "a", factors("x", 300, 700)), base=base)
    whole = adapted.load("x.weight").reshape(-1)
    for start, stop in [(0, 1), (699, 701), (64_999, 130_123), (209_999, 210_000), (5, 5), (0, 210_000)]:
        assert torch.equal(adapted.load_elements("x.weight", start, stop), whole[start:stop])


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 6 / 3),
        ({"use_rslora": True}, 6 / math.sqrt(3)),
        ({"alpha_pattern": {"up_proj": 12}}, 12 / 3),
        ({"alpha_pattern": {"layers.1.mlp.up_proj": 12}}, 6 / 3),
        ({"alpha_pattern": {"layers.0.mlp.up_proj": 9, "up_proj": 12}}, 9 / 3),
        ({"r": 7, "rank_pattern": {"up_proj": 3}}, 6 / 3),
    ],
)
def test_scaling_follows_the_configuration(tmp_path, base, config, scaling):
    tensors = factors(UP, 24, 16)
    adapted = open_checkpoint(write_adapter(tmp_path / "a", tensors, **config), base=base)
    delta = adapted.load(f"{UP}.weight") - base.load(f"{UP}.weight").float()
    torch.testing.assert_close(delta, scaling * product(tensors, UP), rtol=1e-4, atol=1e-5)


def test_fan_in_fan_out_transposes(tmp_path, base):
    tensors = factors(UP, 16, 24)  # the module maps 24 -> 16 and stores [in, out] = [24, 16]
    adapted = open_checkpoint(write_adapter(tmp_path / "a", tensors, fan_in_fan_out=True), base=base)
    delta = adapted.load(f"{UP}.weight") - base.load(f"{UP}.weight").float()
    torch.testing.assert_close(delta, 2.0 * product(tensors, UP).T, rtol=1e-4, atol=1e-5)


def test_embeddings_and_stored_tensors(tmp_path, base):
    down, up = torch.randn(RANK, 37), torch.randn(16, RANK)
    head = torch.randn(37, 16)
    tensors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": down,
        "base_model.model.model.embed_tokens.lora_embedding_B": up,
        "base_model.model.lm_head.modules_to_save.weight": head,
        "base_model.model.model.norm.weight": torch.full((16,), 3.0),
    }
    adapted = open_checkpoint(write_adapter(tmp_path / "a", tensors), base=base)
    delta = adapted.load("model.embed_tokens.weight") - base.load("model.embed_tokens.weight").float()
    torch.testing.assert_close(delta, 2.0 * (up @ down).T, rtol=1e-4, atol=1e-5)
    assert torch.equal(adapted.load("lm_head.weight"), head)
    assert torch.equal(adapted.load("model.norm.weight"), torch.full((16,), 3.0))


def test_agrees_with_peft_itself(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**{key: CONFIG[key] for key in CONFIG if key not in ("dtype", "architectures")})
    )
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        r=4,
        lora_alpha=10,
        use_rslora=True,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        alpha_pattern={"down_proj": 3},
        rank_pattern={"q_proj": 2},
        init_lora_weights=False,
    )
    adapter = get_peft_model(model, lora)
    adapter.base_model.model.lm_head.modules_to_save["default"].weight.data.normal_()
    adapter.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()
    ours = open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "base"))
    assert set(ours.tensors) == set(merged)
    for name, tensor in merged.items():
        torch.testing.assert_close(ours.load(name).float(), tensor, rtol=1e-5, atol=1e-6, msg=name)
    changed = [name for name in merged if not torch.equal(ours.load(name), ours.base.load(name))]
    assert len(changed) == 2 * 2 + 2  # q and down in two layers, embedding, head


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"trainable_token_indices": [1]}, "trainable tokens"),
        ({"layer_replication": [[0, 1]]}, "layer replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"lora_bias": True}, "bias on B"),
        ({"r": 4}, "do not fit each other"),
        ({"lora_alpha": "x"}, "no positive number"),
        ({"fan_in_fan_out": True}, "do not fit the base"),
    ],
)
def test_what_is_not_this_sum_is_refused_by_name(tmp_path, base, config, complaint):
    path = write_adapter(tmp_path / "a", factors(UP, 24, 16), **config)
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(path, base=base)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop(f"base_model.model.{UP}.lora_B.weight"), "only part of the factors"),
        (lambda t: t.update(factors("model.layers.9.mlp.up_proj", 24, 16)), r"model\.layers\.9\.mlp\.up_proj\.weight"),
        (lambda t: t.update(factors(DOWN, 24, 16)), "do not fit the base"),
        (lambda t: t.update({"base_model.model.x.lora_magnitude_vector": torch.ones(1)}), "lora_magnitude_vector"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}), "does not fit the base"),
        (lambda t: t[f"base_model.model.{UP}.lora_A.weight"].fill_(float("nan")), "not finite"),
    ],
)
def test_a_key_that_does_not_fit_is_refused(tmp_path, base, change, complaint):
    tensors = factors(UP, 24, 16)
    change(tensors)
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(write_adapter(tmp_path / "a", tensors), base=base)


def test_an_adapter_needs_a_base_and_weights(tmp_path, base):
    path = write_adapter(tmp_path / "a", factors(UP, 24, 16))
    with pytest.raises(CheckpointError, match="alone is no checkpoint"):
        open_checkpoint(path)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(path, base=base)
    (path / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="only LoRA"):
        open_checkpoint(path, base=base)


def test_an_adapter_on_a_tied_head_is_refused(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    base = open_checkpoint(write_checkpoint(tmp_path / "b", random_weights(0, llama_shapes(tied=True)), config=config))
    path = write_adapter(tmp_path / "a", factors("lm_head", 37, 16))
    with pytest.raises(CheckpointError, match="tied lm_head"):
        open_checkpoint(path, base=base)
