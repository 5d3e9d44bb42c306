"""Slices of tensors."""

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from megarec.slices import rectangles, share_of_range


@given(st.data(), st.lists(st.integers(1, 5), max_size=3).map(tuple))
def test_a_flat_range_is_rectangles_in_its_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    size = prod(shape)
    first = data.draw(st.integers(0, size))
    last = data.draw(st.integers(first, size))
    numbered = torch.arange(size).view(shape)
    found = [
        numbered[tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))].flatten()
        for start, extent in rectangles(shape, first, last)
    ]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *found]).tolist() == list(range(first, last))
    assert len(found) <= max(1, 2 * len(shape) - 1)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 9))
def test_shares_are_a_range_cut_evenly(first: int, size: int, parts: int) -> None:
    cut = [share_of_range(first, first + size, parts, part) for part in range(parts)]
    assert [index for a, b in cut for index in range(a, b)] == list(range(first, first + size))
    assert max(b - a for a, b in cut) - min(b - a for a, b in cut) <= 1
