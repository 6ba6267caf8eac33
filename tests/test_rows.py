"""Packing: nothing lost, nothing cut, every token sees exactly its own sequence so far, beginnings are shared."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from wpmerge.rows import pack

SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=9)


@given(sequences=SEQUENCES, tokens_per_row=st.integers(1, 40))
def test_every_sequence_is_found_again_and_sees_itself_alone(sequences: list[list[int]], tokens_per_row: int) -> None:
    rows = pack(sequences, tokens_per_row=tokens_per_row)
    assert sorted(number for row in rows for number in row.places) == list(range(len(sequences)))
    for row in rows:
        for number, place in row.places.items():
            assert row.tokens[0, place].tolist() == sequences[number]
            assert row.positions[0, place].tolist() == list(range(len(sequences[number])))
            for depth, node in enumerate(place.tolist()):
                seen = row.visible[node].nonzero().flatten().tolist()
                assert sorted(seen) == sorted(place[: depth + 1].tolist())


@given(sequences=SEQUENCES, tokens_per_row=st.integers(1, 40))
def test_common_beginnings_stand_once(sequences: list[list[int]], tokens_per_row: int) -> None:
    for row in pack(sequences, tokens_per_row=tokens_per_row):
        beginnings = {tuple(sequences[n][: i + 1]) for n in row.places for i in range(len(sequences[n]))}
        assert row.tokens.shape[1] == len(beginnings)
        assert row.tokens.shape[1] <= tokens_per_row or len(row.places) == 1


def test_a_pair_with_and_without_its_instruction() -> None:
    (row,) = pack([[7, 1, 2, 5, 9], [7, 1, 2, 9], [7, 3, 9]])
    assert row.tokens.tolist() == [[7, 1, 2, 5, 9, 9, 3, 9]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 4, 3, 1, 2]]
    assert row.places[1].tolist() == [0, 1, 2, 5]
    assert torch.equal(row.visible[5], torch.tensor([1, 1, 1, 0, 0, 1, 0, 0], dtype=torch.bool))


def test_rows_are_filled_in_order() -> None:
    rows = pack([[1, 2], [3, 4], [5, 6]], tokens_per_row=4)
    assert [list(row.places) for row in rows] == [[0, 1], [2]]
