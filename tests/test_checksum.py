import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wpmerge.checksum import PERIOD, Checksum, checksum

M = 2**64


def splitmix(seed):
    """The reference, in plain integers."""
    z = (seed + 0x9E3779B97F4A7C15) % M
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % M
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % M
    return z ^ (z >> 31)


def reference(data):
    data += bytes(-len(data) % 8)
    total = 0
    for i in range(len(data) // 8):
        period, place = divmod(i, PERIOD)
        word = int.from_bytes(data[8 * i : 8 * i + 8], "little")
        total += word * (splitmix(place) | 1) * (2 * splitmix(2**32 + period) + 1)
    return f"dot64:{total % M:016x}"


def test_splitmix_of_the_paper():
    assert splitmix(0) == 0xE220A8397B1DCDAF  # the published first output of seed 0


@given(data=st.binary(max_size=200))
def test_is_its_definition(data):
    assert checksum(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)) == reference(data)


def test_over_periods_in_any_order():
    tensor = torch.randn(3 * PERIOD, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[
        : 2 * PERIOD + 501
    ]
    data = tensor.numpy().tobytes()
    assert checksum(tensor) == reference(data)
    starts = list(range(0, len(tensor), 1000))
    random.Random(0).shuffle(starts)
    made = Checksum()
    for start in starts:
        made.add(start * 8, tensor[start : start + 1000])
    assert made.text() == reference(data)
    with pytest.raises(ValueError, match="multiple of 8"):
        made.add(4, tensor)


@given(place=st.integers(0, 999), bit=st.integers(0, 7))
def test_any_flipped_bit_and_any_swap_is_seen(place, bit):
    data = torch.arange(1000).to(torch.uint8)
    before = checksum(data)
    data[place] ^= 1 << bit
    assert checksum(data) != before
    words = torch.arange(100)
    swapped = words.clone()
    swapped[[place % 100, (place + 1) % 100]] = words[[(place + 1) % 100, place % 100]]
    assert checksum(swapped) != checksum(words)
