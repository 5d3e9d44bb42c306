"""Normalisation inside of MLPs beside torch's own, in float64; what conversions and skipped steps leave of it."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megarec.models.blocks import MLP
from megarec.models.norms import BatchNorm, LayerNorm, apply_statistics


def randomised(columns: int, bias: bool, kind: type[BatchNorm] | type[LayerNorm]) -> tuple[nn.Module, nn.Module]:
    mine = kind(columns, bias).double()
    theirs: nn.Module = nn.BatchNorm1d(columns) if kind is BatchNorm else nn.LayerNorm(columns, bias=bias)
    theirs.double()
    for name, parameter in mine.named_parameters():
        nn.init.normal_(parameter)
        theirs.get_parameter(name).data.copy_(parameter.data)
    return mine, theirs


@given(examples=st.integers(2, 6), columns=st.integers(2, 5), bias=st.booleans(), batch=st.booleans())
@settings(max_examples=30, deadline=None)
def test_values_gradients_and_running_statistics_are_torchs(
    examples: int, columns: int, bias: bool, batch: bool
) -> None:
    mine, theirs = randomised(columns, bias, BatchNorm if batch else LayerNorm)
    for _ in range(2):
        x = torch.randn(examples, columns, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(examples, columns, dtype=torch.float64)
        made: list[list[Tensor]] = []
        for norm in (mine, theirs):
            y = norm(x)
            named = [norm.get_parameter(name) for name, _ in mine.named_parameters()]
            made.append([y.detach(), *torch.autograd.grad(y, [x, *named], weights)])
        for one, other in zip(*made, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        apply_statistics(mine)
    torch.testing.assert_close(dict(mine.named_buffers()), {n: theirs.get_buffer(n) for n, _ in mine.named_buffers()})
    x = torch.randn(1, columns, dtype=torch.float64)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))


def in_parts(x: Tensor, norm: BatchNorm | LayerNorm, dimension: int) -> list[Tensor]:
    """y of two ranks that hold halves of what the statistics are over: each adds the other's numbers to its own."""
    sent: list[Tensor] = []

    def collect(total: Tensor, direction: Literal["forward", "backward"]) -> None:
        sent.append(total.clone())

    halves = x.chunk(2, dim=dimension)
    for half in halves:
        norm.spread_over(collect, 2, 1)
        norm(half)

    def add(total: Tensor, direction: Literal["forward", "backward"]) -> None:
        total.copy_(sent[0] + sent[1])

    norm.spread_over(add, 2, 1)
    return [norm(half) for half in halves]


def test_halves_of_a_batch_are_normalised_as_the_whole() -> None:
    x = torch.randn(8, 3) * 0.01 + 100  # a mean of 10,000 deviations: sums of squares in float32 would lose them
    norm = BatchNorm(3)
    whole = norm(x)
    torch.testing.assert_close(torch.cat(in_parts(x, norm, 0)), whole, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_float32(dtype: torch.dtype) -> None:
    mlp = MLP(4, [3], 1, norm="batch")
    mlp(torch.randn(8, 4))
    apply_statistics(mlp)
    norm = mlp.norms[0]
    assert isinstance(norm, BatchNorm)
    before = norm.running_mean.clone()
    mlp.to(dtype)
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert torch.equal(norm.running_mean, before)
    assert norm.weight.dtype == dtype and mlp(torch.randn(8, 4, dtype=dtype)).dtype == dtype


def test_a_step_that_is_not_applied_leaves_no_trace() -> None:
    norm = BatchNorm(2)
    norm(torch.randn(4, 2))
    assert torch.equal(norm.running_mean, torch.zeros(2)) and torch.equal(norm.running_var, torch.ones(2))


def test_an_mlp_without_biases_has_none_here_either() -> None:
    assert not any(name.endswith("bias") for name, _ in MLP(3, [2, 2], 1, bias=False, norm="batch").named_parameters())
