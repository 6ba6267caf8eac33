"""Pack token sequences into rows that share what their beginnings have in common.

A row is a tree: sequences that begin alike share those tokens, and every token sees its ancestors and itself only (a
tree-shaped attention mask). A chat template's head is computed once per row, and so is the query of a pair with and
without its instruction; nothing is padded; and the batch axis is free for patched copies of the model.

Shape suffixes: T tokens of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """Token sequences in one row of T tokens, common beginnings once.

    Attributes:
        tokens: token ids.
        positions: each token's position in its own sequence.
        visible: true where the row's token may attend to the column's.
        places: sequence number → where its tokens stand in the row, shared ones included.
    """

    tokens: Int[Tensor, "1 T"]
    positions: Int[Tensor, "1 T"]
    visible: Bool[Tensor, "T T"]
    places: Mapping[int, Int[Tensor, " _"]]


def pack(sequences: Sequence[Sequence[int]], *, tokens_per_row: int = 384) -> list[Row]:
    """Pack token sequences, in order, into rows of about ``tokens_per_row`` tokens.

    A row holds at least one sequence, so a sequence longer than ``tokens_per_row`` is never cut.
    """
    rows: list[Row] = []
    tree = _Tree()
    for number, sequence in enumerate(sequences):
        if tree.paths and len(tree.tokens) + tree.new_tokens(sequence) > tokens_per_row:
            rows.append(tree.row())
            tree = _Tree()
        tree.add(number, sequence)
    return [*rows, tree.row()]


def row_groups(rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """Consecutive rows of at most so many tokens together; a longer row stands alone."""
    group: list[Row] = []
    held = 0
    for row in rows:
        if group and held + row.tokens.shape[1] > tokens:
            yield group
            group, held = [], 0
        group.append(row)
        held += row.tokens.shape[1]
    yield group


@dataclass(slots=True)
class _Tree:
    """A prefix tree in the making: per node its token, its parent (−1 for none) and its children by token."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    children: dict[tuple[int, int], int] = field(default_factory=dict)
    paths: dict[int, list[int]] = field(default_factory=dict)

    def new_tokens(self, sequence: Sequence[int]) -> int:
        """How many nodes a sequence would add."""
        node = -1
        for depth, token in enumerate(sequence):
            if (node, token) not in self.children:
                return len(sequence) - depth
            node = self.children[node, token]
        return 0

    def add(self, number: int, sequence: Sequence[int]) -> None:
        """Put a sequence into the tree."""
        node, path = -1, []
        for token in sequence:
            if (node, token) not in self.children:
                self.children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
            node = self.children[node, token]
            path.append(node)
        self.paths[number] = path

    def row(self) -> Row:
        """The tree as a row: a token's position is its depth, and it sees the path that leads to it."""
        count = len(self.tokens)
        visible = torch.eye(count, dtype=torch.bool)
        positions = [0] * count
        for node, parent in enumerate(self.parents):  # parents come before their children
            if parent >= 0:
                visible[node] |= visible[parent]
                positions[node] = positions[parent] + 1
        return Row(
            tokens=torch.tensor([self.tokens]),
            positions=torch.tensor([positions]),
            visible=visible,
            places={number: torch.tensor(path) for number, path in self.paths.items()},
        )
