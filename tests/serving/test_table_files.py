"""Rows of exported tables: exact in fp32, within half a step when quantised."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megarec.serving.scorer.tables import Table, encode_rows, row_bytes

ROWS = arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 9)),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
)


def read(values: np.ndarray, kind: str) -> np.ndarray:
    encoded = encode_rows(values, kind)
    assert encoded.shape == (len(values), row_bytes(kind, values.shape[1])) and encoded.dtype == np.uint8
    table = Table(encoded.reshape(-1), kind, values.shape[1])
    assert len(table) == len(values)
    found = table.rows(np.arange(len(values))[::-1].copy())
    assert found.dtype == np.float32
    return found[::-1]


@given(ROWS)
def test_fp32_is_exact(values: np.ndarray) -> None:
    assert (read(values, "fp32") == values).all()


@given(ROWS)
def test_fp16_is_the_nearest(values: np.ndarray) -> None:
    assert (read(values, "fp16") == values.astype(np.float16).astype(np.float32)).all()


@pytest.mark.parametrize(("kind", "levels"), [("int8", 254), ("int4", 15)])
@given(values=ROWS)
def test_a_quantised_row_is_off_by_half_a_step_at_most(kind: str, levels: int, values: np.ndarray) -> None:
    """A float16 scale is up to 1/1024 too large, and as small as 6e-8."""
    low, high = values.min(axis=1), values.max(axis=1)
    widest = 2 * np.abs(values).max(axis=1) if kind == "int8" else high - low + np.abs(low) / 512
    step = widest / levels * (1 + 1 / 512) + 6.1e-8
    assert (np.abs(read(values, kind) - values) <= step[:, None] / 2 * (1 + 1e-3) + 6.1e-8).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_equal_numbers_stay_equal(kind: str) -> None:
    assert (read(np.zeros((2, 5), np.float32), kind) == 0).all()
    same = read(np.full((1, 5), 0.3, np.float32), kind)
    assert (same == same[0, 0]).all() and same[0, 0] == pytest.approx(0.3, rel=2e-3)


def test_bytes_of_a_row_of_sixteen() -> None:
    assert [row_bytes(kind, 16) for kind in ("fp32", "fp16", "int8", "int4")] == [64, 32, 18, 12]
