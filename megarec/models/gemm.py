"""bf16 products on CPUs that cannot multiply bf16.

Without AVX512 (x86) torch multiplies bf16 matrices on a CPU in plain loops, tens of times slower than fp32. An
fp32 GEMM of the same operands, rounded to bf16, is the same product (bf16 GEMMs accumulate in fp32 anyway). So
that bf16 runs can be rehearsed on any machine, the dense model multiplies this way there. GPUs and CPUs with
bf16 instructions are not touched.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = {F.linear, torch.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__}


class _Float32Products(TorchFunctionMode):
    """Products of bf16 operands in fp32, rounded to bf16; autograd follows, so their gradients too."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _PRODUCTS or args[0].dtype != torch.bfloat16 or torch.is_autocast_enabled("cpu"):
            return func(*args, **(kwargs or {}))
        widened = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        return func(*widened, **(kwargs or {})).bfloat16()


def fast_cpu_gemm(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Around a forward pass: fast bf16 products where torch has none, else nothing."""
    slow = device.type == "cpu" and dtype == torch.bfloat16 and not _cpu_multiplies_bf16()
    return _Float32Products() if slow else nullcontext()


def _cpu_multiplies_bf16() -> bool:
    """What torch itself asks before it hands a bf16 product on a CPU to oneDNN."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
