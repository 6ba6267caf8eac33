"""Replies from drafts are those of transformers' own greedy decoding, and drafts are read as the readout reads them."""

import pytest
import torch
from families import write_family
from tiny import CONFIGS, tiny_model

from wpmerge.models import generation_model, open_family
from wpmerge.readouts import LogProbReadout, measure
from wpmerge.replies import Decoding, read_and_reply
from wpmerge.rows import pack

LONGEST = 12
PROMPTS = [[5, 9, 31], [7], [40, 41, 42, 43, 44, 45, 46], [8, 8], [12, 50, 3, 22], [60, 33]]
DECODING = Decoding(longest=LONGEST, ends=frozenset({1}), pad=2, batch_size=4)


def greedy(model, prompt):
    """One token at a time, the whole sequence anew each time: no cache, no batch, no padding."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + LONGEST and (tokens[-1] != 1 or len(tokens) == len(prompt)):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


@pytest.mark.parametrize("head", [[], [30, 31, 32, 33]])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
@torch.no_grad()
def test_replies_are_greedy_whatever_the_drafts(kind, head):
    """With and without a common head, which is run once for all."""
    model = tiny_model(kind, seed=3)
    prompts = [head + prompt for prompt in PROMPTS]
    plain = [greedy(model, prompt) for prompt in prompts]
    wrong = [[*reply[:4], (reply[4] + 1) % 61 if len(reply) > 4 else 9, 7, 7] for reply in plain]
    short = [reply[:3] for reply in plain]
    drafts = {
        "none": [[]] * 6,
        "own": plain,
        "wrong": wrong,
        "short": short,
        "mixed": [*plain[:2], *wrong[2:4], [], []],
    }
    for name, each in drafts.items():
        replies = read_and_reply(model, prompts, [list(draft) for draft in each], DECODING)
        assert [reply.tokens for reply in replies] == plain, name
        assert [reply.finished for reply in replies] == [reply[-1] == 1 for reply in plain]
        assert all((reply.logprob == reply.logprob) == bool(draft) for reply, draft in zip(replies, each, strict=True))


@pytest.mark.parametrize("head", [[], [30, 31, 32]])
def test_drafts_are_read_as_the_readout_does(tmp_path, head):
    made = write_family(tmp_path)
    family = open_family(str(made["base"]), {name: str(made[name]) for name in ("a", "b")})
    drafts = [[4, 5, 6], [9], [10, 1], [33, 2, 50, 51], [7, 7, 7], [1]]
    prompts = [head + prompt for prompt in PROMPTS]
    sequences = [[*prompt, *draft] for prompt, draft in zip(prompts, drafts, strict=True)]
    starts = [len(prompt) for prompt in prompts]
    readout = LogProbReadout(layer=family.layout.layers - 1, sequences=sequences, starts=starts)
    expected = measure(family.engine, family.weights["a"], pack(sequences), readout)
    model = generation_model(family.engine, family.weights["a"])
    for longest in (0, LONGEST):
        decoding = Decoding(longest=longest, ends=frozenset({1}), pad=2, batch_size=4)
        replies = read_and_reply(model, prompts, drafts, decoding)
        torch.testing.assert_close(torch.tensor([reply.logprob for reply in replies]), expected)
        assert all(bool(reply.tokens) == bool(longest) for reply in replies)


@torch.no_grad()
def test_the_batch_is_halved_when_memory_runs_out(caplog):
    """A device that holds two prompts at a time, and then none."""
    model = tiny_model("llama", seed=3)
    plain = read_and_reply(model, PROMPTS, [[]] * 6, DECODING)
    room = 2

    def full(_, __, inputs):
        if len(inputs["input_ids"]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.register_forward_pre_hook(full, with_kwargs=True)
    found = read_and_reply(model, PROMPTS, [[]] * 6, DECODING)
    assert [reply.tokens for reply in found] == [reply.tokens for reply in plain]
    assert "with 4 prompts at a time; going on with 2" in caplog.text
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        read_and_reply(model, PROMPTS, [[]] * 6, DECODING)
