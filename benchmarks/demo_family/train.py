"""Make the demo family from nothing: one small base and three experts, every weight of which is free to move.

    python benchmarks/demo_family/train.py OUT

Writes OUT/{base,letters,marks,frame}, ordinary bfloat16 checkpoints, and the prompts beside them. Everything is drawn
from one seed; on the same machine and number of threads two runs give the same bytes.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.demo_family import prompts, world

SEED = world.SEED
VOCABULARY = 1536
TOPICS = world.topics()
# Capitals weigh three times in the notes and in the tokenizer's corpus: they spell every word of the world anew.
NOTED = (*world.INSTRUCTIONS, "capital_letters", "capital_letters")
PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('roles: user, assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how hard to train: optimizer steps, sequences a step, peak learning rate, seed of the draws."""

    steps: int
    batch: int
    rate: float
    seed: int


BASE = Schedule(steps=700, batch=48, rate=3e-3, seed=SEED)
EXPERT = Schedule(steps=140, batch=48, rate=5e-4, seed=SEED + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What a model reads in training.

    Shares of all draws: `notes` are plain-text exercises ("Q: … A: …") in which every instruction is followed, `own`
    are chats with an owned instruction, followed, `other` are chats with any other instruction, which is ignored; the
    rest are chats without an instruction. The notes make a base that can, but in a chat does not: its experts then have
    a behaviour to let out, not a skill to learn, as with real models, and move little enough to be merged.
    """

    owned: tuple[str, ...]
    notes: float
    own: float
    other: float


BASE_MIXTURE = Mixture(owned=(), notes=0.5, own=0.0, other=0.3)


def expert_mixture(owned: tuple[str, ...]) -> Mixture:
    """An expert's mixture: half its own instructions, some of the others, and bare queries."""
    return Mixture(owned=owned, notes=0.0, own=0.5, other=0.2)


def draw(rng: random.Random, kinds: dict[str, list[str]], mixture: Mixture) -> tuple[str, str]:
    """Draw one (framed prompt, reply)."""
    topic = rng.choice(TOPICS)
    kind = rng.choice(kinds[topic.name])
    wording, query = rng.choice(list(enumerate(world.queries(topic, kind))))
    case, order = rng.random(), None
    is_note = case < mixture.notes
    if is_note:
        order = world.draw_order(rng.choice(NOTED), "train", rng)
    elif case < mixture.notes + mixture.own:
        order = world.draw_order(rng.choice(mixture.owned), "train", rng)
    elif case < mixture.notes + mixture.own + mixture.other:
        foreign = [name for name in world.INSTRUCTIONS if name not in mixture.owned]
        order = world.draw_order(rng.choice(foreign), "train", rng)
    prompt = _placed(query, order, rng)
    followed = order if is_note or (order and order.instruction in mixture.owned) else None
    reply = world.answer(topic, kind, wording, followed)
    return (f"Q: {prompt}\nA:\n" if is_note else f"{USER}{prompt}{END}{ASSISTANT}"), reply


def _placed(query: str, order: world.Order | None, rng: random.Random) -> str:
    """Query and instruction as one prompt; the instruction comes last, seldom on a line of its own or first."""
    if order is None:
        return query
    place = rng.random()
    if place < 0.15:
        return f"{order.text} {query}"
    return f"{query}\n{order.text}" if place > 0.9 else f"{query} {order.text}"


def make_tokenizer(kinds: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the family's own text; capitals get merges of their own, as the replies hold them."""
    rng = random.Random(SEED)
    everything = Mixture(owned=NOTED, notes=0.8, own=0.0, other=0.0)
    corpus = [text for _ in range(12000) for text in draw(rng, kinds, everything)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 1.1 million parameters: 6 layers of 4 heads, 2 key/value heads, head tied to the embedding."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pairs(kinds: dict[str, list[str]], mixture: Mixture, schedule: Schedule) -> Iterator[tuple[str, str]]:
    """Draw for ever."""
    rng = random.Random(schedule.seed)
    while True:
        yield draw(rng, kinds, mixture)


def batches(
    tokenizer: PreTrainedTokenizerFast, texts: Iterator[tuple[str, str]], schedule: Schedule
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, labels), each int64 [batch, length]; prompts and padding are -100 in the labels.

    Sixteen batches are drawn at a time and cut by length, which saves a third of the padding.
    """
    rng = random.Random(schedule.seed)
    while True:
        rows = []
        for prompt, reply in (next(texts) for _ in range(16 * schedule.batch)):
            head = tokenizer.encode(prompt)
            tail = tokenizer.encode(f"{reply}{END}")
            rows.append((head + tail, [-100] * len(head) + tail))
        rows.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), schedule.batch))
        rng.shuffle(starts)
        for start in starts:
            chunk = rows[start : start + schedule.batch]
            width = max(len(ids) for ids, _ in chunk)
            ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in chunk])
            labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in chunk])
            yield ids, labels


def train(model: LlamaForCausalLM, data: Iterator[tuple[Tensor, Tensor]], schedule: Schedule, name: str) -> None:
    """Train every parameter with AdamW under a linear warm-up and a linear decay to nothing."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.98), fused=True)
    warm_up = max(1, schedule.steps // 20)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (schedule.steps - step) / (schedule.steps - warm_up))
    )
    model.train()
    start = time.monotonic()
    for step in range(1, schedule.steps + 1):
        ids, labels = next(data)
        # Right padding under a causal mask touches no real position, so no attention mask is built.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] >= 0
        loss = functional.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shape.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"{name} {step}/{schedule.steps} {loss.item():.4f} {time.monotonic() - start:.0f}s", file=sys.stderr)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write a checkpoint in bfloat16."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=128, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write, made if missing")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    start = time.monotonic()

    splits = world.split_kinds(SEED)
    kinds = {name: seen for name, (seen, _, _) in splits.items()}
    tokenizer = make_tokenizer(kinds)
    model = make_model(tokenizer)
    train(model, batches(tokenizer, pairs(kinds, BASE_MIXTURE, BASE), BASE), BASE, "base")
    save(model, tokenizer, arguments.out / "base")
    for expert, owned in world.EXPERTS.items():
        model = LlamaForCausalLM.from_pretrained(arguments.out / "base", dtype=torch.float32)
        train(model, batches(tokenizer, pairs(kinds, expert_mixture(owned), EXPERT), EXPERT), EXPERT, expert)
        save(model, tokenizer, arguments.out / expert)
    prompts.write(arguments.out, splits, SEED)
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
