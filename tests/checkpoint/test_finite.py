"""Numbers that are not finite are found in every type, wherever they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarec.checkpoint.writing import CHUNK, all_finite

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@given(st.lists(st.floats(width=16) | st.just(float("nan")), max_size=20))
def test_as_torch_says(dtype: torch.dtype, numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=dtype)
    assert all_finite(values) == bool(values.isfinite().all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_beyond_the_first_chunk_and_with_a_sum_that_overflows(dtype: torch.dtype) -> None:
    values = torch.full((CHUNK + 7,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(values)
    values[-1] = float("-inf")
    assert not all_finite(values)
