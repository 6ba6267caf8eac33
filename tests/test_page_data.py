"""What a page holds of many numbers: three digits of each, whatever their size; and nothing that ends its element."""

import base64
import json
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import number_of

from wpmerge.page_data import compressed, packed_columns, packed_numbers


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def codes(values: list[float]) -> list[int]:
    planes = np.frombuffer(unpacked(packed_numbers(np.array(values)[:, None])), dtype=np.uint8)
    high, low = planes[: len(values)].astype(int), planes[len(values) :].astype(int)
    return list((high * 256 + low).tolist())


def test_data_cannot_end_their_element() -> None:
    value = {"a": "</script><!--"}
    assert "<" not in compressed(value) and json.loads(unpacked(compressed(value))) == value


def test_codes_are_as_documented() -> None:
    assert codes([float("nan"), 0.0, 1.23, -1.23]) == [0, 1, 2 + 62 * 900 + 23, 2 + 63 * 900 + 23]


@given(st.floats(min_value=-9e4, max_value=9e4))
def test_three_digits_are_kept(value: float) -> None:
    found = number_of(codes([value])[0])
    assert found is not None
    assert found == pytest.approx(value, rel=0.5001e-2, abs=1e-31)


@pytest.mark.parametrize("value", [0.000999, 0.00999999, 0.1, 1.0, 999.5, 1000.0, 1e-12, 0.00123, -0.0456])
def test_the_digits_are_those_of_rounding(value: float) -> None:
    assert number_of(codes([value])[0]) == pytest.approx(float(f"{value:.3g}"), rel=1e-12)


def test_what_is_out_of_range_is_the_nearest() -> None:
    assert [number_of(code) for code in codes([1e9, -1e9, 1e-40])] == [99900.0, -99900.0, 0.0]


def test_columns_are_in_planes() -> None:
    assert unpacked(packed_columns(np.array([[1, 258], [3, 4]], dtype=">u2"))) == bytes([0, 0, 1, 3, 1, 0, 2, 4])
