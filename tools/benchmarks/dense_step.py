"""One training step of a dense model on random data, and the memory it needs."""

import multiprocessing as mp
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from megarec.config.models import WukongConfig
from megarec.distributed.process import keep_freed_memory
from megarec.models.cpu_gemm import fast_cpu_gemm
from megarec.models.wukong import Wukong

BATCH_MULTIPLE = 32
PROBES = 64, 192  # batches whose peaks give the line


class MasterAdamW:
    """AdamW whose state is fp32; beside bf16 parameters it keeps fp32 master weights, as DeepSpeed does.

    It updates one parameter at a time, so that no more than one gradient exists in fp32.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.masters = [nn.Parameter(p.detach().float()) if p.dtype != torch.float32 else p for p in parameters]
        self.optimizers = [torch.optim.AdamW([master], lr=1e-4, fused=True) for master in self.masters]

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters and forget their gradients."""
        for parameter, master, optimizer in zip(self.parameters, self.masters, self.optimizers, strict=True):
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            master.grad = gradient.to(master.dtype)
            optimizer.step()
            optimizer.zero_grad()
            if parameter is not master:
                parameter.copy_(master)


def training_step(
    model: nn.Module, n: int, dim: int, batch: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """Forward, backward down to X_0 [batch, n, dim], and optimizer step; parameters and activations in dtype."""
    model = model.to(device, dtype)
    optimizer = MasterAdamW(list(model.parameters()))
    x = torch.randn(batch, n, dim, device=device, dtype=dtype).requires_grad_()
    labels = torch.randint(0, 2, (batch,), device=device).float()

    def step() -> None:
        with fast_cpu_gemm(device, dtype):
            logits: Tensor = model(x).float()
        nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
        optimizer.step()
        x.grad = None

    return step


def largest_batch(
    n: int, config: WukongConfig, dtype: torch.dtype, device: torch.device, limit: int
) -> tuple[int, int]:
    """The largest batch (of 32s) whose step stays in `limit` bytes, and its measured peak.

    Predicted by the line through the peaks of two small batches, then measured; a process of its own each time.
    """
    small, large = (_peak(n, config, batch, dtype, device) for batch in PROBES)
    slope = (large - small) / (PROBES[1] - PROBES[0])
    batch = int((limit - large) / slope + PROBES[1]) // BATCH_MULTIPLE * BATCH_MULTIPLE
    while batch > BATCH_MULTIPLE:
        peak = _peak(n, config, batch, dtype, device)
        if peak <= limit:
            return batch, peak
        batch -= -int((limit - peak) // slope // BATCH_MULTIPLE) * BATCH_MULTIPLE
    raise ValueError(f"no batch of {n} x {config.dim} stays in {limit:,} bytes: the model alone needs {small:,}")


def _peak(n: int, config: WukongConfig, batch: int, dtype: torch.dtype, device: torch.device) -> int:
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_peak, (n, config, batch, dtype, device, torch.get_num_threads()))


def _measure_peak(
    n: int, config: WukongConfig, batch: int, dtype: torch.dtype, device: torch.device, threads: int
) -> int:
    """Peak bytes of this process over two steps: resident ones on a CPU, interpreter and libraries included."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    step = training_step(Wukong(n, config), n, config.dim, batch, dtype, device)
    for _ in range(2):  # the optimizer's state is made at the end of the first one
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    high_water = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert high_water is not None
    return int(high_water[1]) * 1024
