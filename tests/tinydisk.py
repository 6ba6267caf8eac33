"""Tiny random models on disk with a tokenizer, as a user's base and experts would lie there."""

from pathlib import Path

import torch
from tiny import tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# ids 0, 1 and 2 are what the tiny configs call begin, end and padding
SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>", "<user>", "<reply>", "Q:", "A:"]
VOCABULARY = [*SPECIAL, *(f"w{n}" for n in range(61 - len(SPECIAL)))]
TEMPLATE = (
    "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<reply>{% endif %}"
)


def tiny_tokenizer(*, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """61 words, one token each."""
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


def save_model(path: Path, model: torch.nn.Module, *, template: str | None = TEMPLATE) -> Path:
    """A checkpoint directory as transformers writes it."""
    model.save_pretrained(path)
    tiny_tokenizer(template=template).save_pretrained(path)
    return path


def save_family(path: Path, model_type: str = "llama", *, experts: int = 2, **changes: object) -> dict[str, str]:
    """``base`` and ``e0``, ``e1``, …, each a different random model: name → directory."""
    made = {}
    for seed, name in enumerate(["base", *(f"e{n}" for n in range(experts))]):
        made[name] = str(save_model(path / name, tiny_model(model_type, seed=seed, **changes)))
    return made
