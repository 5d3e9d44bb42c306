"""Matrix products on CPUs: bf16 where the CPU cannot multiply it, and blocks of a batch that stay in the cache.

Without AVX512 (x86) torch multiplies bf16 matrices on a CPU in plain loops, tens of times slower than fp32. An
fp32 GEMM of the same operands, rounded to bf16, is the same product (bf16 GEMMs accumulate in fp32 anyway). So
that bf16 runs can be rehearsed on any machine, the dense model multiplies this way there. What is kept for the
backward pass stays bf16. GPUs and CPUs with bf16 instructions are not touched.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

CACHE_BYTES = 4 * 2**20  # of fp32 examples in a block: several products then read them from the cache


def fast_cpu_gemm(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Around a forward pass: fast bf16 products where torch has none, else nothing."""
    return _Float32Products() if _is_slow(device, dtype) else nullcontext()


def widened(x: Tensor) -> Tensor:
    """In fp32, where products in x's own type are slow; else x itself."""
    return x.float() if _is_slow(x.device, x.dtype) else x


def in_blocks(x: Tensor) -> bool:
    """Whether a batch is cut into blocks for the cache: on a CPU."""
    return x.device.type == "cpu"


def example_blocks(x: Tensor) -> list[slice]:
    """The batch [B, ...] cut into blocks that fit a CPU's cache and divide among its threads."""
    batch = len(x)
    block = batch
    if x.numel():
        fitting, threads = CACHE_BYTES // (4 * (x.numel() // batch)), torch.get_num_threads()
        block = max(1, -(-fitting // threads)) * threads
    return [slice(start, start + block) for start in range(0, batch, block)] if batch else []


def scaled_product(a_MK: Tensor, b_KN: Tensor, scale: float) -> Tensor:
    """`scale` x A B, without a scaled copy of either."""
    if _is_slow(a_MK.device, a_MK.dtype):
        return (a_MK.float() @ b_KN.float()).mul_(scale).to(a_MK.dtype)
    return torch.addmm(a_MK.new_empty(1), a_MK, b_KN, beta=0, alpha=scale)


def summed_products(a_BMD: Tensor, b_BND: Tensor) -> Tensor:
    """Sum over the examples of a block of A B^T, [M, N]; a block is small, and its products stay in the cache."""
    return torch.bmm(a_BMD, b_BND.mT).sum(0)


def _is_slow(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == torch.bfloat16 and not _cpu_multiplies_bf16()


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    """torch's own condition for passing a bf16 product on a CPU to oneDNN."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Float32Products(TorchFunctionMode):
    """Products of bf16 operands in fp32, rounded to bf16; so are their gradients."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or args[0].dtype != torch.bfloat16 or torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        return _PRODUCTS[func](*args, **kwargs)


class _Linear(torch.autograd.Function):
    """x [..., I], weight [O, I], bias [O] or None -> x W^T + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).bfloat16()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = grads[0].float()
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight.float()).bfloat16()
        dy = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[1]:
            dweight = (dy.T @ x.reshape(-1, x.shape[-1]).float()).bfloat16()
        if ctx.has_bias:
            dbias = dy.sum(0).bfloat16()
        return dx, dweight, dbias


class _Matmul(torch.autograd.Function):
    """a [.., M, K] and b [.., K, N], both with two or both with three dimensions -> a b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return (a.float() @ b.float()).bfloat16()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        dy = grads[0].float()
        da = (dy @ b.float().mT).bfloat16() if ctx.needs_input_grad[0] else None
        db = (a.float().mT @ dy).bfloat16() if ctx.needs_input_grad[1] else None
        return da, db


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = _Linear.apply(input, weight, bias)
    return product


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    if input.shape[:-2] != other.shape[:-2] or input.dim() < 2:  # broadcast: autograd sums where it must
        return (input.float() @ other.float()).bfloat16()
    product: Tensor = _Matmul.apply(input, other)
    return product


_PRODUCTS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.bmm: lambda input, mat2: _matmul(input, mat2),
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
}
