"""The fused projection against einsum in float64: values, gradients, blocks of the batch, bf16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarec.dense.memory import saved_activations
from megarec.models import cpu_gemm, projection
from megarec.models.projection import Projection, project


def plain(x: Tensor, interact: bool, *weights: Tensor) -> tuple[Tensor, ...]:
    parts = [torch.einsum("on,bnd->bod", weight, x) for weight in weights]
    return *parts[interact:], *([torch.einsum("bnd,bkd->bnk", x, parts[0])] if interact else ())


def gradients(function: object, x: Tensor, weight: Tensor, rank: int, upstream: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Of the map of `rank` rows that interacts and two others, which share `upstream`."""
    others, fm = upstream
    weights = weight.tensor_split([rank, rank + 1] if rank else [1])
    outputs = function(x, rank > 0, *weights)  # type: ignore[operator]
    gradient = [*others.tensor_split([1], dim=1), *([fm] if rank else [])]
    loss = sum((out * up.to(out)).sum() for out, up in zip(outputs, gradient, strict=True))
    return [*outputs, *torch.autograd.grad(loss, (x, weight))]


def case(batch: int, n: int, dim: int, rank: int, others: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(batch + n)
    x, weight = torch.randn(batch, n, dim).double(), torch.randn(rank + others, n).double()
    upstream = torch.randn(batch, others, dim).double(), torch.randn(batch, n, rank).double()
    return x.requires_grad_(), weight.requires_grad_(), upstream


@given(
    batch=st.integers(0, 7),
    n=st.integers(1, 5),
    dim=st.integers(1, 4),
    rank=st.integers(0, 3),
    others=st.integers(1, 3),
    block=st.integers(1, 8),
)
@settings(max_examples=100, deadline=None)
def test_values_and_gradients_whatever_the_blocks(
    batch: int, n: int, dim: int, rank: int, others: int, block: int
) -> None:
    x, weight, upstream = case(batch, n, dim, rank, others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_gemm, "CACHE_BYTES", 4 * n * dim * block)
        threads = torch.get_num_threads()
        assert len(cpu_gemm.example_blocks(x)) == -(-batch // (-(-block // threads) * threads))
        actual = gradients(project, x, weight, rank, upstream)
    for mine, its in zip(actual, gradients(plain, x, weight, rank, upstream), strict=True):
        torch.testing.assert_close(mine, its)


def test_embeddings_that_lie_apart_in_memory() -> None:
    _, weight, upstream = case(4, 5, 6, 2, 3)
    apart = torch.randn(4, 7, 6).double()[:, 1:6].requires_grad_()
    turned = torch.randn(4, 6, 5).double().mT.requires_grad_()
    for strided in (apart, turned):
        for mine, its in zip(
            gradients(project, strided, weight, 2, upstream),
            gradients(plain, strided, weight, 2, upstream),
            strict=True,
        ):
            torch.testing.assert_close(mine, its)


@given(batch=st.integers(1, 5), n=st.integers(1, 9), rank=st.integers(0, 3), others=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_what_an_accelerator_does(batch: int, n: int, rank: int, others: int) -> None:
    """The batch whole, W with padded rows; its numbers here."""
    x, weight, upstream = case(batch, n, 4, rank, others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "in_blocks", lambda x: False)
        patch.setattr(projection, "stacked", lambda weights: projection.padded(torch.cat(list(weights))))
        assert projection.stacked([weight]).stride(0) % 8 == 0
        actual = gradients(project, x, weight, rank, upstream)
    for mine, its in zip(actual, gradients(plain, x, weight, rank, upstream), strict=True):
        torch.testing.assert_close(mine, its)


def test_bf16_is_the_exact_result_rounded() -> None:
    x, weight, upstream = case(6, 7, 8, 3, 4)
    rounded = [tensor.detach().bfloat16() for tensor in (x, weight, *upstream)]
    exact = gradients(
        plain, *(t.double().requires_grad_() for t in rounded[:2]), 3, tuple(t.double() for t in rounded[2:])
    )
    actual = gradients(project, *(t.requires_grad_() for t in rounded[:2]), 3, tuple(rounded[2:]))
    for mine, its in zip(actual, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), its, rtol=2**-7, atol=2**-7 * its.abs().mean().item())


def test_what_a_layer_keeps_of_x_is_x_itself() -> None:
    layer = Projection(40, lcb=2, fm=3, residual=4)
    x = torch.randn(50, 40, 16, requires_grad=True)
    kept: dict[str, int] = {}
    with saved_activations(kept):
        layer(x, interact=True)
    weights_and_y = 4 * (9 * 40 + 50 * 3 * 16)
    assert kept["bytes"] == x.nbytes + weights_and_y


def test_parts_by_name() -> None:
    torch.manual_seed(0)
    layer = Projection(5, lcb=2, fm=3, residual=None).double()
    x = torch.randn(4, 5, 6).double()
    (parts,) = layer(x)
    assert list(parts) == ["lcb", "fm"]
    interacted, fm = layer(x, interact=True)
    assert list(interacted) == ["lcb"]
    for part, name in ((parts["lcb"], "lcb"), (parts["fm"], "fm"), (interacted["lcb"], "lcb")):
        torch.testing.assert_close(part, torch.einsum("on,bnd->bod", layer.get_parameter(name), x))
    torch.testing.assert_close(fm, torch.bmm(x, parts["fm"].mT))
