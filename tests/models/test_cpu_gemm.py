"""bf16 products through fp32: the product rounded to bf16, for values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from megarec.dense.memory import saved_activations
from megarec.models import cpu_gemm
from megarec.models.cpu_gemm import _Float32Products, fast_cpu_gemm


def test_products_and_gradients_are_the_exact_ones_rounded() -> None:
    torch.manual_seed(0)
    x, weight, y = (torch.randn(size).bfloat16().requires_grad_() for size in ((2, 5, 7), (3, 7), (2, 3, 4)))
    bias = torch.randn(3).bfloat16().requires_grad_()
    with _Float32Products():
        hidden = F.linear(x, weight, bias)
        out = torch.bmm(hidden, y)
    assert hidden.dtype == out.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.double(), x.double() @ weight.double().T + bias.double(), rtol=2**-8, atol=0.0)
    torch.testing.assert_close(out.double(), hidden.double() @ y.double(), rtol=2**-8, atol=1e-6)

    upstream = torch.randn(2, 5, 4).bfloat16()
    d_hidden, d_weight, d_y = torch.autograd.grad(out, (hidden, weight, y), upstream)
    exact = upstream.double() @ y.double().mT
    torch.testing.assert_close(d_hidden.double(), exact, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(d_y.double(), hidden.double().mT @ upstream.double(), rtol=2**-8, atol=1e-6)
    weight_gradient = torch.einsum("bno,bni->oi", d_hidden.double(), x.double())
    torch.testing.assert_close(d_weight.double(), weight_gradient, rtol=2**-7, atol=1e-5)


def test_what_is_kept_for_the_backward_pass_stays_bf16() -> None:
    x, weight, y = (torch.randn(size).bfloat16().requires_grad_() for size in ((2, 5, 7), (3, 7), (2, 3, 4)))
    kept: dict[str, int] = {}
    with _Float32Products(), saved_activations(kept):
        hidden = F.linear(x, weight)
        torch.bmm(hidden, y)
    assert kept["bytes"] == sum(tensor.nbytes for tensor in (x, weight, hidden, y))


def test_products_of_few_or_broadcast_dimensions() -> None:
    torch.manual_seed(0)
    weight, vector = torch.randn(4, 3).bfloat16().requires_grad_(), torch.randn(3).bfloat16()
    x = torch.randn(2, 5, 4).bfloat16()
    with _Float32Products():
        products = weight @ vector, x @ weight, F.linear(x[0, 0], weight.T)
        (gradient,) = torch.autograd.grad(products[1].sum() + products[2].sum(), weight)
    exact = weight.double() @ vector.double(), x.double() @ weight.double(), x[0, 0].double() @ weight.double()
    for mine, its in zip(products, exact, strict=True):
        torch.testing.assert_close(mine.double(), its, rtol=2**-8, atol=1e-6)
    expected = (x.double().sum((0, 1)) + x[0, 0].double()).unsqueeze(1).expand(4, 3)
    torch.testing.assert_close(gradient.double(), expected, rtol=2**-6, atol=2**-6)


def test_other_products_are_untouched() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    with _Float32Products():
        assert torch.equal(F.linear(x, x), x @ x.T)
        assert F.linear(x, x).dtype == torch.float64


def test_only_slow_cpus_need_it() -> None:
    slow = not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # x86 builds of torch always have oneDNN
    assert isinstance(fast_cpu_gemm(torch.device("cpu"), torch.bfloat16), _Float32Products) == slow
    assert not isinstance(fast_cpu_gemm(torch.device("cuda"), torch.bfloat16), _Float32Products)
    assert not isinstance(fast_cpu_gemm(torch.device("cpu"), torch.float32), _Float32Products)


def test_a_scaled_product_is_that_of_a_scaled_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(7, 5).to(dtype).T, torch.randn(7, 6).to(dtype)
        assert torch.equal(cpu_gemm.scaled_product(a, b, 0.25), (a / 4) @ b)
    exact = a.double() @ b.double() / 3
    monkeypatch.setattr(cpu_gemm, "_is_slow", lambda device, dtype: dtype == torch.bfloat16)
    torch.testing.assert_close(cpu_gemm.scaled_product(a, b, 1 / 3).double(), exact, rtol=2**-8, atol=1e-6)
