"""Random Llama checkpoints for the merge benchmark: a base and three experts of about 1.03 billion parameters."""

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

CHUNK = 2**24


def shapes(hidden: int, inner: int, layers: int, kv: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an untied Llama's tensors."""
    made: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        made |= {
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    return made | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


SIZES = {
    "tiny": {"hidden": 64, "inner": 128, "layers": 2, "kv": 32, "vocab": 256},
    "small": {"hidden": 1024, "inner": 2816, "layers": 4, "kv": 256, "vocab": 8000},
    "fusing": {"hidden": 1024, "inner": 2816, "layers": 16, "kv": 256, "vocab": 16000},
    "scoring": {"hidden": 2048, "inner": 5632, "layers": 22, "kv": 256, "vocab": 32000},
    "full": {"hidden": 2048, "inner": 5632, "layers": 20, "kv": 512, "vocab": 32000},
    "double": {"hidden": 2048, "inner": 5632, "layers": 43, "kv": 512, "vocab": 32000},
}


def config(hidden: int, inner: int, layers: int, kv: int, vocab: int) -> dict[str, object]:
    """A config.json that transformers and mergekit accept."""
    head = max(16, hidden // 32)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // head,
        "num_key_value_heads": kv // head,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def make_family(directory: Path, size: str, *, experts: int = 3, shards: int = 4) -> list[Path]:
    """Write a base and experts, which are the base plus normal noise of a tenth of its spread, in bfloat16.

    Returns:
        Their directories, the base first.
    """
    names = list(shapes(**SIZES[size]).items())
    paths = [directory / name for name in ("base", *(f"expert{i}" for i in range(experts)))]
    per_shard = -(-sum(int(np.prod(shape)) for _, shape in names) // shards)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in names:
        if sum(int(np.prod(other)) for other in groups[-1].values()) >= per_shard:
            groups.append({})
        groups[-1][name] = shape
    for number, path in enumerate(paths):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config(**SIZES[size])))
        weight_map: dict[str, str] = {}
        for i, group in enumerate(groups):
            file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
            tensors = {name: _weights(name, shape, number) for name, shape in group.items()}
            safetensors.torch.save_file(tensors, path / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(group, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return paths


def _weights(name: str, shape: tuple[int, ...], number: int) -> torch.Tensor:
    out = torch.empty(int(np.prod(shape)), dtype=torch.bfloat16)
    for start in range(0, out.numel(), CHUNK):
        stop = min(start + CHUNK, out.numel())
        seed = [ord(letter) for letter in name] + [start]
        block = np.random.default_rng(seed).standard_normal(stop - start, dtype=np.float32) * np.float32(0.02)
        base = torch.from_numpy(block + np.float32(name.endswith("norm.weight"))).bfloat16()
        if number:
            noise = np.random.default_rng([*seed, number]).standard_normal(stop - start, dtype=np.float32)
            base = (base.float() + torch.from_numpy(noise * np.float32(0.002))).bfloat16()
        out[start:stop] = base
    return out.view(shape)
