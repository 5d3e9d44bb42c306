"""The kernel of the local shuffle, interpreted on the CPU, against the plain path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.data.batch import Ids
from megarec.sparse.exchange.fused_regroup import FusedRegroup
from megarec.sparse.exchange.regroup import ColumnBlock, Regroup

pytest.importorskip("triton", reason="triton is not installed")
CPU = torch.device("cpu")


@st.composite
def shuffles(draw: st.DrawFn) -> tuple[Regroup, FusedRegroup, int, int]:
    """The same columns both ways, how many they are, and how many examples."""
    unit, senders = draw(st.sampled_from([1, 3, 4, 16, 160])), draw(st.integers(1, 3))
    widths = [unit * n for n in draw(st.lists(st.integers(1, 3), min_size=1, max_size=7))]
    owners = [draw(st.integers(0, senders - 1)) for _ in widths]
    pieces: list[list[ColumnBlock]] = []
    for sender in range(senders):
        own: list[ColumnBlock] = []
        for i in draw(st.permutations([i for i, owner in enumerate(owners) if owner == sender])):
            offset = sum(piece.columns for piece in own)
            own.append(ColumnBlock(f"f{i}", sum(widths[:i]), offset, widths[i]))
        pieces.append(own)
    mean = [f"f{i}" for i in range(len(widths)) if draw(st.booleans())]
    plain = Regroup(pieces, CPU, mean)
    numbers = [
        (sender, piece.offset, piece.columns, mean.index(piece.feature) if piece.feature in mean else -1)
        for sender, piece in plain.in_layout_order
    ]
    fused = FusedRegroup([sum(piece.columns for piece in own) for own in pieces], numbers, CPU)
    return plain, fused, sum(widths), draw(st.sampled_from([1, 5, 33]))


TYPES = [(torch.float32, torch.float32), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(shuffles(), st.sampled_from(TYPES), st.sampled_from([1, 3, 4]))
def test_both_ways(
    case: tuple[Regroup, FusedRegroup, int, int], types: tuple[torch.dtype, torch.dtype], divide: int
) -> None:
    plain, fused, columns, size = case
    here, there = types
    names = plain.mean
    ids = {name: Ids(torch.zeros(0), torch.randint(0, 4, (size,))) for name in names}
    divisors = plain.divisors(ids)
    # In float32 the same bits: so the flat and the tower exchange, which divide in two kernels, give the same as well.
    close = {"rtol": 0, "atol": 0} if there == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}  # one bit of bf16
    blocks = torch.randn(size * columns).to(here)
    torch.testing.assert_close(
        fused.assemble(blocks, divisors, size, there), plain.assemble(blocks, divisors, size, there), **close
    )
    gradient = torch.randn(size, columns + 8).to(here)[:, :columns]  # part of a wider matrix
    found, total = fused.scatter(gradient, divisors, size, there, divide)
    expected = plain.scatter(gradient, divisors, size, there, divide)
    torch.testing.assert_close(found, expected.blocks, **close)
    torch.testing.assert_close(total, gradient.sum(dtype=torch.float32), rtol=1e-4, atol=1e-3)
    gradient[size - 1, columns - 1] = torch.nan
    assert not fused.scatter(gradient, divisors, size, there, divide)[1].isfinite()
