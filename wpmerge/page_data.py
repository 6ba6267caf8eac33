"""What a page's script reads, made small: JSON deflated, scores as three digits in 16 bits. Pure functions."""

import base64
import json
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_EXPONENT, EXPONENTS = -33, 36
"""Of the numbers in 16 bits: ±100…999 · 10^e, from 1e-31 to 99,900. Smaller is 0, larger the largest."""


def compressed(value: Any) -> str:
    """JSON, deflated, in base64: a third of the size of JSON, and nothing in it can end a script element."""
    return packed_bytes(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode())


def packed_bytes(content: bytes) -> str:
    """Deflated, in base64."""
    return base64.b64encode(zlib.compress(content, 9)).decode()


def packed_numbers(values: NDArray[np.float64]) -> str:
    """Numbers by column, three digits of each; NaN stays NaN.

    A code is 0 for NaN, 1 for 0, otherwise 2 + (2 (e + 33) + (1 if negative)) · 900 + m - 100, for ±m · 10^e.

    Args:
        values: [rows, columns].
    """
    size = np.abs(np.nan_to_num(values))
    known = size >= 100 * 10.0**LEAST_EXPONENT
    exponent = np.floor(np.log10(np.where(known, size, 1.0))) - 2
    digits = np.rint(np.where(known, size, 100.0) / 10.0**exponent)
    exponent += digits >= 1000  # 999.7 is 100 · 10
    digits = np.where(digits >= 1000, 100, digits)
    over = exponent >= LEAST_EXPONENT + EXPONENTS
    exponent = np.where(over, LEAST_EXPONENT + EXPONENTS - 1, exponent)
    digits = np.clip(np.where(over, 999, digits), 100, 999)
    code = 2 + (2 * (exponent - LEAST_EXPONENT) + (values < 0)) * 900 + digits - 100
    return packed_columns(np.where(np.isnan(values), 0, np.where(known, code, 1)).astype(">u2"))


def packed_columns(values: NDArray[Any]) -> str:
    """Whole numbers by column, of each column the first bytes, then the second ones, ...: alike bytes lie together.

    Args:
        values: [rows, columns], big-endian.
    """
    columns = np.ascontiguousarray(values.T)
    planes = columns.view(np.uint8).reshape(*columns.shape, values.dtype.itemsize).transpose(0, 2, 1)
    return packed_bytes(np.ascontiguousarray(planes).tobytes())
