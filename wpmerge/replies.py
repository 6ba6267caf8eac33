"""What a model says to prompts, and how likely it finds given replies: both from one run, fast.

Each prompt may come with a draft, a reference reply. One forward run over prompt and draft gives the draft's
log-probability, and also how far the model's own greedy reply agrees with it: only from the first other token on is
anything generated, with the cache of that same run. The replies are those of plain greedy decoding; a merge that
mostly says what its expert says costs little more than reading.

Shape suffixes: B prompts of a batch, T tokens, D residual width.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from wpmerge.errors import ran_out_of_memory

logger = logging.getLogger(__name__)

LOGIT_ROWS = 256
"""Positions whose logits are held at once: a vocabulary of 50,000 takes 51 MB for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a model did with one prompt.

    Attributes:
        tokens: its greedy reply, up to and with the end token, at most as long as asked for; empty if not asked for.
        logprob: mean log-probability of the draft, nats per token; NaN without a draft.
        finished: whether the reply came to its end token.
    """

    tokens: tuple[int, ...]
    logprob: float
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How replies are made.

    Attributes:
        longest: most tokens of a reply; 0 reads drafts only.
        ends: tokens that end a reply.
        pad: what fills up shorter rows; never seen by any token.
        batch_size: prompts run together.
    """

    longest: int
    ends: frozenset[int]
    pad: int
    batch_size: int = 48


@torch.no_grad()
def read_and_reply(
    model: Any,
    prompts: Sequence[Sequence[int]],
    drafts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """Read drafts and reply to prompts, in the order given.

    Args:
        model: transformers' causal language model.
        prompts: token ids up to where the reply starts, at least one each.
        drafts: a reply each, at most ``decoding.longest`` tokens where replies are asked for; may be empty.
        decoding: see :class:`Decoding`.
        progress: told prompts done and prompts in all.
    """
    head = _common_head(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -(len(prompts[i]) + len(drafts[i])))
    replies: dict[int, Reply] = {}
    size = decoding.batch_size
    while len(replies) < len(order):
        batch = order[len(replies) : len(replies) + size]
        try:
            found = _batch(model, head, [prompts[i] for i in batch], [drafts[i] for i in batch], decoding)
        except Exception as error:
            if len(batch) == 1 or not ran_out_of_memory(error):
                raise
            size = len(batch) // 2
            logger.warning("memory ran out with %d prompts at a time; going on with %d", len(batch), size)
            continue
        replies |= dict(zip(batch, found, strict=True))
        if progress is not None:
            progress(len(replies), len(order))
    return [replies[i] for i in range(len(order))]


def _common_head(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, a chat template's mostly; less than any prompt has."""
    shortest = min(map(len, prompts)) - 1
    return next((i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1), shortest)


def _batch(
    model: Any, head: int, prompts: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]], decoding: Decoding
) -> list[Reply]:
    rows = [[*prompt, *draft] for prompt, draft in zip(prompts, drafts, strict=True)]
    width = max(map(len, rows))
    device = next(model.parameters()).device
    # Padding stands on the right, where a causal mask hides it from every real token; generated tokens come after it,
    # under a mask that hides padding and refuted drafts, with positions of their own.
    tokens_bt = torch.tensor([row + [decoding.pad] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    columns = torch.arange(width, device=device)
    cache = None
    if head:  # once, not once a prompt
        first = tokens_bt[:1, :head]
        cache = model.base_model(input_ids=first, position_ids=columns[None, :head], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rows))
    output = model.base_model(
        input_ids=tokens_bt[:, head:],
        attention_mask=(columns < lengths[:, None]).long(),
        position_ids=columns[head:].expand(len(rows), -1),
        past_key_values=cache,
        use_cache=head > 0 or decoding.longest > 0,
    )
    chosen, logprobs = _read_drafts(model, output.last_hidden_state, [len(prompt) - head for prompt in prompts], drafts)
    if not decoding.longest:
        return [Reply(tokens=(), logprob=logprob, finished=False) for logprob in logprobs]
    replies = [_agreed(draft, own, decoding) for draft, own in zip(drafts, chosen, strict=True)]
    known = [[*prompt, *reply[:-1]] for prompt, reply in zip(prompts, replies, strict=True)]
    if (window := _window(model)) is not None and width + decoding.longest > window:
        # a window counts columns, so a row must have no holes: run what is known again, padded on the left
        state = _run_left_padded(model, known, decoding.pad)
    else:
        seen = torch.tensor([len(row) for row in known], device=device)
        state = (output.past_key_values, torch.arange(width, device=device) < seen[:, None])
    _continue(model, *state, [len(prompt) for prompt in prompts], replies, decoding)
    return [
        Reply(tokens=tuple(reply), logprob=logprob, finished=reply[-1] in decoding.ends)
        for reply, logprob in zip(replies, logprobs, strict=True)
    ]


def _window(model: Any) -> int | None:
    """How far back the model's attention reaches, if that is bounded anywhere."""
    window = getattr(model.config, "sliding_window", None)
    return int(window) if window else None


def _run_left_padded(model: Any, rows: Sequence[Sequence[int]], pad: int) -> tuple[Any, Bool[Tensor, "B T"]]:
    """Run token sequences that end in the same column; the cache, and where it holds tokens."""
    device = next(model.parameters()).device
    width = max(map(len, rows))
    tokens_bt = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    columns = torch.arange(width, device=device)
    mask_bt = columns >= width - lengths[:, None]
    positions_bt = (columns - (width - lengths[:, None])).clamp_min(0)
    output = model.base_model(
        input_ids=tokens_bt, attention_mask=mask_bt.long(), position_ids=positions_bt, use_cache=True
    )
    return output.past_key_values, mask_bt


def _read_drafts(
    model: Any, hidden: Tensor, starts: Sequence[int], drafts: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[float]]:
    """The model's own choice at every token of each draft and the one after, and each draft's log-probability.

    Args:
        model: its head.
        hidden: the residual stream, normed.
        starts: where in ``hidden`` each draft starts.
        drafts: token ids.
    """
    rows: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    for row, (start, draft) in enumerate(zip(starts, drafts, strict=True)):
        rows += [row] * (len(draft) + 1)
        places += range(start - 1, start + len(draft))
        targets += [*draft, 0]
    read = hidden[torch.tensor(rows), torch.tensor(places)]
    best, taken = [], []
    for part, target in zip(read.split(LOGIT_ROWS), torch.tensor(targets).split(LOGIT_ROWS), strict=True):
        logits = output_logits(model, part)
        best += logits.argmax(dim=-1).tolist()
        picked = logits.gather(1, target.to(logits.device)[:, None])[:, 0]
        taken += (picked - logits.logsumexp(dim=-1)).tolist()
    chosen, logprobs, start = [], [], 0
    for draft in drafts:
        stop = start + len(draft)
        chosen.append(best[start : stop + 1])
        logprobs.append(sum(taken[start:stop]) / len(draft) if draft else float("nan"))
        start = stop + 1
    return chosen, logprobs


def output_logits(model: Any, hidden: Tensor) -> Tensor:
    """Next-token logits from what the body gives, in float32; Gemma 2's cap included."""
    logits: Tensor = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _agreed(draft: Sequence[int], own: Sequence[int], decoding: Decoding) -> list[int]:
    """The reply as far as it is known: the draft as long as it is the model's own choice, and the choice after that."""
    reply: list[int] = []
    for place, token in enumerate(own):
        reply.append(token)
        if token in decoding.ends or len(reply) == decoding.longest or place == len(draft) or token != draft[place]:
            break
    return reply


def _continue(
    model: Any,
    cache: Any,
    mask_bt: Bool[Tensor, "B T"],
    heads: Sequence[int],
    replies: list[list[int]],
    decoding: Decoding,
) -> None:
    """Extend the replies that have not come to an end, greedily, in place.

    ``cache`` holds prompts and replies but for each reply's last token; ``mask_bt`` says where.
    """
    rows = list(range(len(replies)))
    while True:
        alive = [
            at
            for at, row in enumerate(rows)
            if replies[row][-1] not in decoding.ends and len(replies[row]) < decoding.longest
        ]
        if not alive:
            return
        if len(alive) <= 0.75 * len(rows):  # finished rows would be carried along
            index: Int[Tensor, " B"] = torch.tensor(alive, device=mask_bt.device)
            cache.batch_select_indices(index)
            mask_bt, rows = mask_bt[index], [rows[at] for at in alive]
            alive = list(range(len(rows)))
        last = torch.tensor([[replies[row][-1]] for row in rows], device=mask_bt.device)
        places = torch.tensor([[heads[row] + len(replies[row]) - 1] for row in rows], device=mask_bt.device)
        mask_bt = torch.cat([mask_bt, mask_bt.new_ones(len(rows), 1)], dim=1)
        output = model.base_model(
            input_ids=last, attention_mask=mask_bt.long(), position_ids=places, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        chosen = output_logits(model, output.last_hidden_state[:, -1]).argmax(dim=-1).tolist()
        for at in alive:
            replies[rows[at]].append(chosen[at])
