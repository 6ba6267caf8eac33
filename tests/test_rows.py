"""Packing: every sequence is found again, sees itself and its prefix, and nothing is cut."""

from hypothesis import given
from hypothesis import strategies as st

from wpmerge.rows import common_prefix, pack

TOKENS = st.integers(0, 5)
SEQUENCES = st.tuples(st.lists(TOKENS, max_size=4), st.lists(st.lists(TOKENS, min_size=1, max_size=7), min_size=1)).map(
    lambda drawn: [drawn[0] + branch for branch in drawn[1]]
)


@given(SEQUENCES, st.integers(1, 30))
def test_packing(sequences: list[list[int]], size: int) -> None:
    rows = pack(sequences, tokens_per_row=size)
    prefix = common_prefix(sequences)
    numbers = [number for row in rows for number in row.places]
    assert numbers == list(range(len(sequences)))
    for row in rows:
        length = row.tokens.shape[1]
        assert length == prefix + sum(len(sequences[number]) - prefix for number in row.places)
        assert length <= size or len(row.places) == 1
        owners: dict[int, set[int]] = {place: set() for place in range(length)}
        for number, places in row.places.items():
            spots = places.tolist()
            assert row.tokens[0, places].tolist() == sequences[number]
            assert row.positions[0, places].tolist() == list(range(len(sequences[number])))
            # what a token of this sequence sees is exactly the sequence up to and with itself
            for i, spot in enumerate(spots):
                assert row.visible[spot].nonzero().flatten().tolist() == sorted(spots[: i + 1])
                owners[spot].add(number)
        assert all(owners.values()), "no token stands idle"


@given(SEQUENCES)
def test_the_common_prefix_is_common_and_cannot_be_longer(sequences: list[list[int]]) -> None:
    length = common_prefix(sequences)
    shortest = min(map(len, sequences))
    assert all(sequence[:length] == sequences[0][:length] for sequence in sequences)
    assert length < shortest
    longer_is_shared = all(sequence[: length + 1] == sequences[0][: length + 1] for sequence in sequences)
    assert not longer_is_shared or length + 1 == shortest


def test_a_row_by_hand() -> None:
    (row,) = pack([[7, 8, 1], [7, 8, 2, 3]])
    assert row.tokens.tolist() == [[7, 8, 1, 2, 3]]
    assert row.positions.tolist() == [[0, 1, 2, 2, 3]]
    assert {number: places.tolist() for number, places in row.places.items()} == {0: [0, 1, 2], 1: [0, 1, 3, 4]}
    assert row.visible.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_rows_are_filled_in_order_and_each_has_the_prefix() -> None:
    sequences = [[9, 1, 1], [9, 2], [9, 3, 3, 3, 3, 3, 3], [9, 4]]
    rows = pack(sequences, tokens_per_row=5)
    assert [list(row.places) for row in rows] == [[0, 1], [2], [3]]
    assert [row.tokens.tolist()[0] for row in rows] == [[9, 1, 1, 2], [9, 3, 3, 3, 3, 3, 3], [9, 4]]
