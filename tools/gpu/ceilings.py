"""This machine's peak rates, measured in the same minute: the reference of all other figures."""

import time

import torch

from megarec.models.cpu_gemm import fast_cpu_gemm
from tools.gpu.context import Context, copy_seconds, seconds_of

GB = 10**9


def run(context: Context) -> None:
    device, sizes = context.device, context.sizes
    moved = 2 * sizes.copy_bytes
    context.emit("copy, read and written", moved / copy_seconds(device, sizes.copy_bytes) / 1e12, "TB/s")
    n = sizes.gemm
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    with fast_cpu_gemm(device, torch.bfloat16):
        seconds = seconds_of(lambda: torch.matmul(a, b), device, repeats=20)
    context.emit("bf16 product", 2 * n**3 / seconds / 1e12, "TFLOP/s")
    a, b = a.float(), b.float()
    context.emit("fp32 product", 2 * n**3 / seconds_of(lambda: a @ b, device, repeats=5) / 1e12, "TFLOP/s")
    if device.type == "cpu":
        return
    size = GB
    start = time.perf_counter()
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    context.emit("to pin a GB", time.perf_counter() - start, "s")
    on_device = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    to_host = seconds_of(lambda: pinned.copy_(on_device, non_blocking=True), device, repeats=5)
    to_device = seconds_of(lambda: on_device.copy_(pinned, non_blocking=True), device, repeats=5)
    context.emit("pinned copy to the device", size / to_device / GB, "GB/s")
    context.emit("pinned copy to the host", size / to_host / GB, "GB/s")
    one = torch.zeros(1, device=device)
    start = time.perf_counter()
    for _ in range(2000):
        one.add_(1)
    launched = time.perf_counter() - start
    torch.accelerator.synchronize()
    context.emit("to start an operation", 1e6 * launched / 2000, "us")
