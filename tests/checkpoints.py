"""Small Llama-shaped checkpoints on disk, made without transformers, for tests of files and merges."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from wpmerge.checkpoint import Checkpoint
from wpmerge.plan import Coefficient, Plan, input_model

HIDDEN, INTER, HEADS, KV_HEADS, VOCAB, LAYERS = 16, 24, 4, 2, 37, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def llama_shapes(layers: int = LAYERS, *, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Llama of the sizes above."""
    kv = HIDDEN * KV_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"model.layers.{i}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"model.layers.{i}.self_attn.v_proj.weight": (kv, HIDDEN),
            f"model.layers.{i}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"model.layers.{i}.mlp.gate_proj.weight": (INTER, HIDDEN),
            f"model.layers.{i}.mlp.up_proj.weight": (INTER, HIDDEN),
            f"model.layers.{i}.mlp.down_proj.weight": (HIDDEN, INTER),
            f"model.layers.{i}.input_layernorm.weight": (HIDDEN,),
            f"model.layers.{i}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes if tied else shapes | {"lm_head.weight": (VOCAB, HIDDEN)}


def random_weights(
    seed: int, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Normal weights, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def tokenizer(vocab: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A byte-pair tokenizer.json."""
    vocab = vocab or {f"t{i}": i for i in range(VOCAB)}
    return {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": dict(vocab), "merges": []}}


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], *, config: Mapping[str, Any] = CONFIG, shards: int = 1
) -> Path:
    """A checkpoint directory as transformers writes it: one file, or shards and an index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(dict(config)))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    names = list(tensors)
    if shards == 1:
        safetensors.torch.save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return path
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        safetensors.torch.save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def family(path: Path, *, experts: int = 2, shards: int = 1, tied: bool = False) -> dict[str, Path]:
    """A base and experts that moved a little from it: names -> directories."""
    shapes = llama_shapes(tied=tied)
    config = CONFIG | {"tie_word_embeddings": tied}
    base = random_weights(0, shapes)
    made = {"base": write_checkpoint(path / "base", base, config=config)}
    for i in range(experts):
        moved = random_weights(i + 1, shapes, torch.float32)
        tensors = {name: (base[name].float() + 0.1 * moved[name]).bfloat16() for name in shapes}
        made[f"e{i}"] = write_checkpoint(path / f"e{i}", tensors, config=config, shards=shards)
    return made


def half_plan(checkpoints: Mapping[str, Checkpoint]) -> Plan:
    """Half of every expert, added to ``base``."""
    numbers = {name: Coefficient(values=torch.tensor(0.5)) for name in checkpoints["base"].tensors}
    experts = [name for name in checkpoints if name != "base"]
    return Plan(
        base=input_model(checkpoints["base"]),
        experts={name: input_model(checkpoints[name]) for name in experts},
        coefficients=dict.fromkeys(experts, numbers),
        rule="uniform",
        granularity="expert",
    )
