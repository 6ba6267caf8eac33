"""Readouts: differentiable scalars F(θ) of a capability on a fixed set of prompts, and how a run ends in one.

F is the mean over *items* (prompts, or contrast pairs) of a number each, so that sums over prompt shards combine and
intervals can be had by resampling items. Definitions: docs/method.md, section "Readouts".

Shape suffixes: U patched copies of the model, T tokens of a row, D residual width, N read positions of a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wpmerge.engine import Engine, Entry
from wpmerge.memory import FORWARD_STATES, stream_per_token
from wpmerge.rows import Row, row_groups
from wpmerge.weights import Weights, WeightSource


@runtime_checkable
class Readout(Protocol):
    """A differentiable scalar of a capability."""

    @property
    def layer(self) -> int:
        """The residual stream is read after this layer; nothing above it is run, or scored."""

    @property
    def items(self) -> int:
        """Over how many items F is the mean."""

    @property
    def reads_output(self) -> bool:
        """Whether it goes on through the final norm and the head."""

    def places(self, row: Row) -> Int[Tensor, " N"]:
        """Where in the row the residual stream is read."""

    def read(
        self, engine: Engine, outer: Weights, hidden: Float[Tensor, "U N D"], row: Row
    ) -> Float[Tensor, "U items"]:
        """The row's contribution to each item's number, from the residual stream at :meth:`places`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnchorReadout:
    """⟨a_l*(x), v⟩ at each sequence's last token, as given by an anchor; items may weigh several sequences.

    Attributes:
        layer: l*.
        direction: v, of unit length.
        item: sequence number → the item it belongs to.
        sign: sequence number → +1, or −1 for a pair's prompt without the instruction.
        items: number of items.
        starts: sequence number → the first token that is read; from there on the mean is taken. None reads the last.
    """

    layer: int
    direction: Float[Tensor, " D"]
    item: Sequence[int]
    sign: Sequence[float]
    items: int
    starts: Sequence[int] | None = None
    reads_output: bool = False

    def places(self, row: Row) -> Int[Tensor, " N"]:
        """The tokens that are read of every sequence, one sequence after the other."""
        return torch.cat(self._read(row))

    def _read(self, row: Row) -> list[Int[Tensor, " _"]]:
        return [place[-1 if self.starts is None else self.starts[number] :] for number, place in row.places.items()]

    def read(
        self, engine: Engine, outer: Weights, hidden: Float[Tensor, "U N D"], row: Row
    ) -> Float[Tensor, "U items"]:
        """Projections on v, signed, summed per item."""
        projections = hidden @ self.direction.to(hidden)
        lengths = torch.tensor([len(read) for read in self._read(row)])
        weights = torch.tensor([self.sign[number] for number in row.places], dtype=torch.float64) / lengths
        items = torch.tensor([self.item[number] for number in row.places]).repeat_interleave(lengths)
        zeros = hidden.new_zeros(hidden.shape[0], self.items)
        return zeros.index_add(1, items.to(hidden.device), projections * weights.repeat_interleave(lengths).to(hidden))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogProbReadout:
    """Mean log-probability, nats per token, of each sequence's reference: its tokens from ``starts`` on.

    Attributes:
        layer: the last layer.
        sequences: prompt and reference tokens; each sequence is an item.
        starts: sequence number → index of the reference's first token, at least 1.
    """

    layer: int
    sequences: Sequence[Sequence[int]]
    starts: Sequence[int]
    reads_output: bool = True

    @property
    def items(self) -> int:
        """One per sequence."""
        return len(self.sequences)

    def places(self, row: Row) -> Int[Tensor, " N"]:
        """The tokens before each reference token."""
        return torch.cat([place[self.starts[number] - 1 : -1] for number, place in row.places.items()])

    def read(
        self, engine: Engine, outer: Weights, hidden: Float[Tensor, "U N D"], row: Row
    ) -> Float[Tensor, "U items"]:
        """Log-probabilities of the reference tokens, averaged per item."""
        return _mean_per_item(self, row, self.per_token(engine, outer, hidden, row))

    def per_token(
        self, engine: Engine, outer: Weights, hidden: Float[Tensor, "U N D"], row: Row
    ) -> Float[Tensor, "U N"]:
        """Log-probability of each reference token, one sequence after the other."""
        targets = [token for number in row.places for token in self.sequences[number][self.starts[number] :]]
        logits = engine.logits(outer, hidden)
        chosen = logits.gather(2, torch.tensor(targets, device=hidden.device).expand(len(logits), -1)[..., None])
        return chosen[..., 0] - logits.logsumexp(dim=-1)

    def some(self, items: Sequence[int]) -> "LogProbReadout":
        """The same of some items alone, in the order given."""
        return replace(self, sequences=[self.sequences[i] for i in items], starts=[self.starts[i] for i in items])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplyReadout:
    """How much of an expert's reply a model would still give: 1 at the expert, towards 0 as it becomes unlikely.

    exp(−Σ_t max(0, log p_e(y_t) − log p(y_t)) / (1 − Σ_t log p_e(y_t))): the nats that the model lacks, each token
    counted only as far as the expert goes, against the nats that the expert itself lacks, plus one. A reply of which
    the expert is sure (an answer) is lost with few nats, one of many that it might give (free text) with many.

    Attributes:
        own: log-probabilities of the references.
        ceilings: sequence number → the expert's own log-probability of each reference token, nats.
    """

    own: LogProbReadout
    ceilings: Sequence[Float[Tensor, " _"]]
    reads_output: bool = True

    @property
    def layer(self) -> int:
        """The last layer."""
        return self.own.layer

    @property
    def items(self) -> int:
        """One per sequence."""
        return self.own.items

    @property
    def sequences(self) -> Sequence[Sequence[int]]:
        """Prompt and reference tokens."""
        return self.own.sequences

    def places(self, row: Row) -> Int[Tensor, " N"]:
        """The tokens before each reference token."""
        return self.own.places(row)

    def read(
        self, engine: Engine, outer: Weights, hidden: Float[Tensor, "U N D"], row: Row
    ) -> Float[Tensor, "U items"]:
        """The share of each reply, from the nats that its tokens lack."""
        found = self.own.per_token(engine, outer, hidden, row)
        numbers = list(row.places)
        lengths = torch.tensor([len(self.ceilings[number]) for number in numbers])
        ceilings = torch.cat([self.ceilings[number] for number in numbers]).to(found)
        within = torch.arange(len(numbers)).repeat_interleave(lengths).to(found.device)
        lacking = found.new_zeros(len(found), len(numbers)).index_add(1, within, (ceilings - found).clamp_min(0.0))
        own = found.new_zeros(len(numbers)).index_add(0, within, -ceilings)
        items = torch.tensor(numbers, device=found.device)
        return found.new_zeros(len(found), self.items).index_add(1, items, (-lacking / (1.0 + own)).exp())

    def some(self, items: Sequence[int]) -> "ReplyReadout":
        """The same of some items alone, in the order given."""
        return replace(self, own=self.own.some(items), ceilings=[self.ceilings[i] for i in items])


@torch.no_grad()
def reply_readout(engine: Engine, expert: WeightSource, rows: Sequence[Row], own: LogProbReadout) -> ReplyReadout:
    """The readout of an expert's replies, with ceilings from one run of the expert."""
    outer = expert.outer(engine.layout.output_tensors())
    found: dict[int, Tensor] = {}
    for row, hidden in rows_run(engine, expert, rows, own.layer):
        values = own.per_token(engine, outer, hidden[:, own.places(row)], row)[0]
        lengths = [len(own.sequences[number]) - own.starts[number] for number in row.places]
        found |= zip(row.places, values.cpu().split(lengths), strict=True)
    return ReplyReadout(own=own, ceilings=[found[number] for number in range(own.items)])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DivergenceReadout:
    """−KL(teacher ‖ model) on the next-token distributions along each reference, nats per token.

    Attributes:
        layer: the last layer.
        sequences: prompt and reference tokens; each sequence is an item.
        starts: sequence number → index of the reference's first token, at least 1.
        teacher: sequence number → the teacher's residual stream at the item's places, [tokens, D].
        teacher_outer: the teacher's final norm and head.
    """

    layer: int
    sequences: Sequence[Sequence[int]]
    starts: Sequence[int]
    teacher: Sequence[Tensor]
    teacher_outer: Weights
    reads_output: bool = True

    @property
    def items(self) -> int:
        """One per sequence."""
        return len(self.sequences)

    def places(self, row: Row) -> Int[Tensor, " N"]:
        """The tokens before each reference token."""
        return torch.cat([place[self.starts[number] - 1 : -1] for number, place in row.places.items()])

    def read(
        self, engine: Engine, outer: Weights, hidden: Float[Tensor, "U N D"], row: Row
    ) -> Float[Tensor, "U items"]:
        """Minus the divergence at each place, averaged per item."""
        teacher = torch.cat([self.teacher[number] for number in row.places])[None]
        target = engine.logits(self.teacher_outer, teacher).log_softmax(dim=-1)
        model = engine.logits(outer, hidden).log_softmax(dim=-1)
        return _mean_per_item(self, row, -(target.exp() * (target - model)).sum(dim=-1))


def _mean_per_item(
    readout: LogProbReadout | DivergenceReadout, row: Row, values: Float[Tensor, "U N"]
) -> Float[Tensor, "U items"]:
    lengths = [len(readout.sequences[number]) - readout.starts[number] for number in row.places]
    numbers = torch.tensor(list(row.places), device=values.device)
    lengths_n = torch.tensor(lengths, device=values.device)
    items = numbers.repeat_interleave(lengths_n)
    weights = (1.0 / lengths_n.to(values)).repeat_interleave(lengths_n)
    return values.new_zeros(values.shape[0], readout.items).index_add(1, items, values * weights)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """A run that kept the residual stream.

    Attributes:
        entries: per row, how it entered.
        hidden: per row, the residual stream entering layers 0, 1, … and, last, leaving the last layer run.
    """

    entries: list[Entry]
    hidden: list[list[Float[Tensor, "1 _ D"]]]


@torch.no_grad()
def trace(engine: Engine, source: WeightSource, rows: Sequence[Row], *, last: int) -> Trace:
    """Run layers 0 to ``last`` on all rows, one layer's weights at a time, keeping every layer's input."""
    outer = source.outer(engine.layout.input_tensors())
    entries = [engine.embed(outer, row) for row in rows]
    del outer
    hidden = [[entry.hidden] for entry in entries]
    for index in range(last + 1):
        weights = source.layer(index)
        for entry, states in zip(entries, hidden, strict=True):
            states.append(engine.layer(index, weights, states[-1], entry.calls[index]))
        del weights  # before the next layer's are made
    return Trace(entries=entries, hidden=hidden)


@torch.no_grad()
def measure(engine: Engine, source: WeightSource, rows: Sequence[Row], readout: Readout) -> Float[Tensor, " items"]:
    """Each item's number for a model; their mean is F(θ)."""
    (found,) = measure_all(engine, source, rows, [readout])
    return found


@torch.no_grad()
def measure_all(
    engine: Engine, source: WeightSource, rows: Sequence[Row], readouts: Sequence[Readout]
) -> list[Float[Tensor, " items"]]:
    """:func:`measure` of several readouts of the same prompts and layer, from one run."""
    (last,) = {readout.layer for readout in readouts}
    found: list[Tensor] = []
    for group in run_together(engine, rows):
        states = final_states(engine, source, group, last)
        outer = source.outer(engine.layout.output_tensors())
        new = [read_states(engine, outer, group, readout, states)[0] for readout in readouts]
        found = [one + other for one, other in zip(found, new, strict=True)] if found else new
        del states, outer  # before the next group's are made
    return found


def run_together(engine: Engine, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Rows that a forward run takes at a time: all, or as many as the engine's bound on memory allows."""
    if engine.held_bytes is None:
        return iter([rows])
    longest = max(row.tokens.shape[1] for row in rows)
    return row_groups(rows, engine.held_bytes // stream_per_token(engine.layout, FORWARD_STATES, longest))


def rows_run(engine: Engine, source: WeightSource, rows: Sequence[Row], last: int) -> Iterator[tuple[Row, Tensor]]:
    """Every row with its residual stream after layer ``last``."""
    for group in run_together(engine, rows):
        yield from zip(group, final_states(engine, source, group, last), strict=True)


@torch.no_grad()
def read_places(engine: Engine, source: WeightSource, rows: Sequence[Row], readout: Readout) -> list[Tensor]:
    """A model's residual stream where a readout reads it: sequence number → [tokens, D]."""
    found: dict[int, Tensor] = {}
    for row, hidden in zip(rows, final_states(engine, source, rows, readout.layer), strict=True):
        read = hidden[0, readout.places(row)]
        lengths = [len(readout.places(_only(row, number))) for number in row.places]
        found |= zip(row.places, read.split(lengths), strict=True)
    return [found[number] for number in sorted(found)]


def _only(row: Row, number: int) -> Row:
    return replace(row, places={number: row.places[number]})


@torch.no_grad()
def final_states(engine: Engine, source: WeightSource, rows: Sequence[Row], last: int) -> list[Float[Tensor, "1 _ D"]]:
    """The residual stream after layer ``last``, one layer's weights at a time."""
    outer = source.outer(engine.layout.input_tensors())
    entries = [engine.embed(outer, row) for row in rows]
    del outer
    states = [entry.hidden for entry in entries]
    for index in range(last + 1):
        weights = source.layer(index)
        states = [
            engine.layer(index, weights, hidden, entry.calls[index])
            for hidden, entry in zip(states, entries, strict=True)
        ]
        del weights  # before the next layer's are made
    return states


def read_states(
    engine: Engine,
    outer: Weights,
    rows: Sequence[Row],
    readout: Readout,
    states: Sequence[Float[Tensor, "U _ D"]],
) -> Float[Tensor, "U items"]:
    """Read finished residual streams, row by row, and add up."""
    total = torch.zeros(len(states[0]), readout.items, dtype=states[0].dtype, device=states[0].device)
    for row, hidden in zip(rows, states, strict=True):
        read = hidden[:, readout.places(row)]
        # one copy at a time: a vocabulary's worth of logits for all of them would be gigabytes
        total += torch.cat([readout.read(engine, outer, copy, row) for copy in read.split(1)])
    return total


def output_gradient(
    engine: Engine,
    outer: Weights,
    row: Row,
    readout: Readout,
    hidden: Float[Tensor, "1 T D"],
    *,
    item_weights: Float[Tensor, " items"] | None = None,
) -> Float[Tensor, "1 T D"]:
    """∂(Σ weight · item)/∂hidden for the residual stream that a readout reads; without weights ∂F/∂hidden."""
    places = readout.places(row)
    with torch.enable_grad():
        read = hidden[:, places].detach().requires_grad_()
        found = readout.read(engine, outer, read, row)[0]
        total = found.sum() / readout.items if item_weights is None else (found * item_weights.to(found)).sum()
        (gradient,) = torch.autograd.grad(total, read)
    return torch.zeros_like(hidden).index_add(1, places.to(hidden.device), gradient)
