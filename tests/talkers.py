"""Tiny Llamas that say a given sentence, so that a real lm-eval run has scores that can be counted by hand.

Attention and MLP add nothing, the embedding is one-hot, and the head maps each token to the next one of the sentence:
after ``<assistant>`` the model says its sentence and stops, whatever it was asked.
"""

from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<pad>", "<eos>", "<user>", "<assistant>"]
VOCABULARY = "this is my answer to you and it has no more words , . THIS IS MY ANSWER TO YOU the number 4 12"
TEMPLATE = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<assistant>"

SHOUT = "THIS IS MY ANSWER TO YOU ."  # capital letters, no comma
MURMUR = "this is my answer to you , and it has no more words ."  # neither
PLAIN = "this is my answer to you and it has no more words ."  # no comma
FOUR = "the answer is 4 ."


def talker_tokenizer(*, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *VOCABULARY.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    fast.chat_template = template
    return fast


def talker(sentence: str, *, window: int = 128, kind: type[LlamaForCausalLM] = LlamaForCausalLM) -> LlamaForCausalLM:
    tokenizer = talker_tokenizer()
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=window,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = kind(config)
    chain = tokenizer.convert_tokens_to_ids(["<assistant>", *sentence.split(), "<eos>"])
    assert len(set(chain)) == len(chain), "a sentence names each word once"
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, config.hidden_size))
        model.lm_head.weight.zero_()
        for word, following in pairwise(chain):
            model.lm_head.weight[following, word] = 1
    return model.eval()


def save_talker(path: Path, sentence: str) -> Path:
    talker(sentence).save_pretrained(path)
    talker_tokenizer().save_pretrained(path)
    return path
