"""Tiny families with random weights and a word-level tokenizer, complete enough for every command."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = 61


def word_tokenizer() -> PreTrainedTokenizerFast:
    """``w3 w4 …``, with tiny.py's special ids."""
    vocabulary = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {f"w{number}": number for number in range(3, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="w3"
    )


def write_family(path: Path, names: tuple[str, ...] = ("a", "b"), *, kind: str = "llama") -> dict[str, Path]:
    """A base and experts that moved a little from it, in bfloat16: names → directories."""
    made = {}
    for number, name in enumerate(("base", *names)):
        model = tiny_model(kind, seed=0, attention_bias=False, mlp_bias=False)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters() if number else ():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.to(torch.bfloat16).save_pretrained(path / name)
        word_tokenizer().save_pretrained(path / name)
        made[name] = path / name
    return made


def write_prompts(path: Path, *, seed: int = 0, count: int = 24) -> Path:
    """A capability given by prompts alone."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(3, WORDS, (count, 4), generator=generator).tolist()
    path.write_text("".join(json.dumps({"prompt": " ".join(f"w{i}" for i in draw)}) + "\n" for draw in draws))
    return path


QUICK: dict[str, Any] = {
    "prompts": 12,
    "held_out": 6,
    "reference_tokens": 6,
    "top_k": 1,
    "random_sample": 1,
    "verify_prompts": 2,
    "readout": ["reference"],
    "kind": ["head", "neuron"],
    "accept_anchor": True,
}
"""Settings of ``score`` that take seconds on such a family."""


def write_home(path: Path) -> Path:
    """A family and the prompts of its two experts, ``a.jsonl`` and ``b.jsonl``."""
    write_family(path)
    for seed, name in enumerate("ab", start=1):
        write_prompts(path / f"{name}.jsonl", seed=seed)
    return path
