"""Tiny random models of every architecture, for the tests."""

import torch

import wpmerge.arch

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.3,
}
NO_GQA = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
LAYER_TYPES = ["full_attention", "sliding_attention", "full_attention"]
CONFIGS: dict[str, dict[str, object]] = {
    "llama": {**SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {**SIZES, "sliding_window": 5},
    "qwen2": {**SIZES, "use_sliding_window": True, "sliding_window": 5, "layer_types": LAYER_TYPES},
    "qwen3": {**SIZES, "head_dim": 6, "attention_bias": True},
    "gemma2": {**SIZES, "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 5, "layer_types": LAYER_TYPES},
    "gemma3_text": {
        **SIZES,
        "head_dim": 6,
        "query_pre_attn_scalar": 6,
        "sliding_window": 5,
        "layer_types": LAYER_TYPES,
    },
    "phi3": {**SIZES, "sliding_window": 5},
    "olmo2": dict(SIZES),
    "gpt_neox": {**NO_GQA, "use_parallel_residual": True},
    "gpt2": {
        "vocab_size": 61,
        "n_embd": 16,
        "n_inner": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.3,
    },
}
assert set(CONFIGS) == set(wpmerge.arch.ARCHITECTURES), "every architecture has a tiny model"


def tiny_model(model_type: str, *, seed: int, dtype: torch.dtype = torch.float32, **changes: object) -> torch.nn.Module:
    """transformers' own model with random weights; biases and norms are random too, so that nothing hides behind 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from wpmerge.engine import register_softcapped_attention

    register_softcapped_attention()
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    torch.manual_seed(seed)
    softcapped = getattr(config, "attn_logit_softcapping", None)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="softcapped" if softcapped else "sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


class ModelWeights:
    """A transformers model as a source of weights."""

    def __init__(self, layout: wpmerge.arch.Layout, tensors: dict[str, torch.Tensor]) -> None:
        self.layout, self.tensors = layout, tensors

    @classmethod
    def of(cls, model: torch.nn.Module) -> "ModelWeights":
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        return cls(wpmerge.arch.Layout(model.config.to_dict(), shapes), tensors)

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        prefix = self.layout.layer_prefix(index)
        return {name.removeprefix(prefix): self.tensors[name] for name in self.layout.layer_tensors(index)}

    def outer(self, names: object = None) -> dict[str, torch.Tensor]:
        return {name: self.tensors[name] for name in self.layout.outer_tensors()}
