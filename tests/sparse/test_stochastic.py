"""Stochastic rounding to float16: unbiased, between the neighbours, and a function of its counters alone."""

import pytest
import torch

from megarec.sparse.placement import Shard
from megarec.sparse.tables.stochastic import Rounding, chances, table_key, to_half

CPU = torch.device("cpu")


def test_one_of_the_two_neighbours_and_the_mean_is_the_number() -> None:
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([1e-7, 3e-6, 6e-5, 1e-3, 0.3, 7.0, 900.0, 6e4])  # from below float16's normal numbers on
    values = (torch.rand(8, 5, generator=generator) + 0.05) * scales[:, None] * torch.tensor([1, -1, 1, -1, 1])
    draws = 4_000
    rows, tables = torch.arange(8), torch.full((8,), table_key(3, "user"))
    columns = torch.arange(5).expand(8, 5)
    found = torch.stack([to_half(values, chances(tables, draw, rows, columns)) for draw in range(draws)]).double()
    nearest = values.half()
    toward = torch.where(nearest.float() > values, -torch.inf, torch.inf).half()
    other = torch.nextafter(nearest, toward).double()
    assert ((found == nearest.double()) | (found == other)).all()
    distance = (other - nearest.double()).abs()
    error = (found.mean(dim=0) - values.double()) / distance
    assert error.abs().max() < 4 * 0.5 / draws**0.5


def test_what_float16_can_hold_stays() -> None:
    values = torch.tensor([[0.0, -0.0, 1.0, 65504.0, 2.0**-24, -(2.0**-14), float("inf"), float("nan")]])
    for chance in (0.0, 1 - 2.0**-24):
        rounded = to_half(values, torch.full_like(values, chance))
        torch.testing.assert_close(rounded.float(), values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(rounded.signbit(), values.signbit())


def test_chances_are_uniform_and_nothing_repeats() -> None:
    shape, draws = (64, 16), 50
    rows, columns = torch.arange(shape[0]), torch.arange(shape[1]).expand(shape)
    tables = torch.cat([torch.full((32,), table_key(3, "user")), torch.full((32,), table_key(3, "item"))])
    found = torch.stack([chances(tables, draw, rows % 32, columns) for draw in range(draws)])
    assert found.min() >= 0 and found.max() < 1
    assert found.mean().item() == pytest.approx(0.5, abs=0.006) and found.var().item() == pytest.approx(
        1 / 12, rel=0.02
    )
    assert found.unique().numel() > 0.99 * found.numel()
    flat = found.view(draws, -1) - 0.5
    for other in (flat.roll(1, 0), flat.roll(1, 1), flat.roll(16, 1), flat.roll(32 * 16, 1)):
        assert abs((flat * other).mean().item()) < 4 / 12 / found.numel() ** 0.5


def test_a_shard_rounds_as_its_part_of_the_whole_table() -> None:
    values = torch.randn(30, 8, generator=torch.Generator().manual_seed(2))
    whole = Rounding([Shard("user", 0, 0, 30, 0, 8)], 5, CPU).round(values, slice(0, 30), 7)
    stack = Rounding([Shard("item", 0, 0, 4, 0, 4), Shard("user", 0, 10, 30, 4, 8)], 5, CPU)
    part = stack.round(values[[12, 29, 10], 4:], torch.tensor([6, 23, 4]), 7)
    assert torch.equal(part, whole[[12, 29, 10], 4:])
    assert not torch.equal(stack.round(values[[12, 29, 10], 4:], torch.tensor([6, 23, 4]), 8), part)
