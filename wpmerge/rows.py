"""Pack token sequences into rows that share their common prefix.

All sequences of a row see one copy of the prefix and themselves only (a tree-shaped attention mask). A chat template's
head is then computed once per row, nothing is padded, and the batch axis is free for patched copies of the model.

Shape suffixes: T tokens of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """Token sequences in one row of T tokens, their common prefix once.

    Attributes:
        tokens: token ids.
        positions: each token's position in its own sequence.
        visible: true where the row's token may attend to the column's.
        places: sequence number → where its tokens stand in the row, prefix included.
    """

    tokens: Int[Tensor, "1 T"]
    positions: Int[Tensor, "1 T"]
    visible: Bool[Tensor, "T T"]
    places: Mapping[int, Int[Tensor, "_"]]


def pack(sequences: Sequence[Sequence[int]], *, tokens_per_row: int = 512) -> list[Row]:
    """Pack token sequences, in order, into rows of about ``tokens_per_row`` tokens.

    A row holds at least one sequence, so a sequence longer than ``tokens_per_row`` is never cut.
    """
    prefix = common_prefix(sequences)
    rows: list[Row] = []
    group: list[int] = []
    used = prefix
    for number, sequence in enumerate(sequences):
        branch = len(sequence) - prefix
        if group and used + branch > tokens_per_row:
            rows.append(_row(sequences, group, prefix))
            group, used = [], prefix
        group.append(number)
        used += branch
    return [*rows, _row(sequences, group, prefix)]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all sequences share, leaving each at least one of its own."""
    limit = min(len(sequence) for sequence in sequences) - 1
    for length in range(limit):
        if any(sequence[length] != sequences[0][length] for sequence in sequences):
            return length
    return limit


def _row(sequences: Sequence[Sequence[int]], group: Sequence[int], prefix: int) -> Row:
    tokens = list(sequences[group[0]][:prefix])
    positions = list(range(prefix))
    owners = [-1] * prefix
    places = {}
    for number in group:
        start, branch = len(tokens), sequences[number][prefix:]
        tokens += branch
        positions += range(prefix, prefix + len(branch))
        owners += [number] * len(branch)
        places[number] = torch.cat([torch.arange(prefix), torch.arange(start, len(tokens))])
    position, owner = torch.tensor(positions), torch.tensor(owners)
    mine_or_prefix = (owner[:, None] == owner) | (owner == -1)
    visible = mine_or_prefix & (position[:, None] >= position)
    return Row(tokens=torch.tensor([tokens]), positions=position[None], visible=visible, places=places)
