"""The GEMM peak of a rank, measured where it runs: the reference of the MFU."""

import time

import torch
from deepspeed.accelerator import get_accelerator

from megarec.models.gemm import fast_cpu_gemm


def measured_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """TFLOP/s of the best square GEMM found in about `seconds`; all ranks should measure at the same time."""
    best = 0.0
    end = time.perf_counter() + seconds
    size = 128
    while time.perf_counter() < end:
        a = torch.randn(size, size, device=device).to(dtype)
        with fast_cpu_gemm(device, dtype):  # as the model multiplies
            torch.matmul(a, a)
            _synchronize(device)
            start = time.perf_counter()
            torch.matmul(a, a)
            _synchronize(device)
            elapsed = time.perf_counter() - start
        best = max(best, 2 * size**3 / elapsed / 1e12)
        # grow only while a GEMM of twice the size (8 times the work) still fits the time that is left
        if size < 8192 and 2 * 8 * elapsed < end - time.perf_counter():
            size *= 2
    return best


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        get_accelerator().synchronize()
