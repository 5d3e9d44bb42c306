"""The dense model beside the machine's GEMM peak and beside a plain implementation, in one process.

A row is one dtype: forward, backward and AdamW(fused) step of a Wukong of about 41 MFLOP forward per example, all
parameters in that dtype. The peak is the best of several GEMMs, square and of the model's own shapes. GEMMs and
models take turns, so that a busy machine slows them alike, and medians count. All use the same threads and the
same products (megarec.models.gemm: on CPUs without bf16 instructions, bf16 products through fp32).
"""

import copy
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megarec.benchmarks.interleave import interleave
from megarec.config.sections import WukongConfig
from megarec.models.cost import count_wukong
from megarec.models.gemm import fast_cpu_gemm
from megarec.models.wukong import InteractionLayer, Wukong

EMBEDDINGS, DIM, NUM_FM, RANK, WIDTHS = 128, 64, 32, 24, [896, 896]
CONFIG = WukongConfig(dim=DIM, layers=4, num_fm=NUM_FM, num_lcb=32, rank=RANK, mlp=WIDTHS, head=[256])
STEP_SECONDS = 1.0  # a step at GEMM speed takes at most this long: the batch follows from it
BATCHES = [2**power for power in range(3, 15)]
ROUNDS = 7


class PlainLayer(nn.Module):
    """The equations one by one: nn.Linear on permuted tensors, a matmul for each product; Y is static."""

    def __init__(self, layer: InteractionLayer) -> None:
        super().__init__()
        weights = layer.projection
        assert weights.fm is not None
        self.y = nn.Parameter(weights.fm.detach().T.clone())
        self.lcb = _linear(weights.lcb)
        self.residual = None if weights.residual is None else _linear(weights.residual)
        self.fm_norm, self.mlp, self.norm = copy.deepcopy([layer.fmb.norm, layer.fmb.mlp, layer.norm])

    def forward(self, x: Tensor) -> Tensor:
        batch, _, dim = x.shape
        fm = torch.matmul(x, torch.matmul(x.permute(0, 2, 1), self.y))
        fmb = self.mlp(self.fm_norm(fm.reshape(batch, -1))).reshape(batch, -1, dim)
        lcb = self.lcb(x.permute(0, 2, 1)).permute(0, 2, 1)
        residual = x if self.residual is None else self.residual(x.permute(0, 2, 1)).permute(0, 2, 1)
        return self.norm(torch.cat([fmb, lcb], dim=1) + residual)


class PlainWukong(nn.Module):
    """The given Wukong with copies of its weights, implemented plainly."""

    def __init__(self, model: Wukong) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(PlainLayer(layer) for layer in model.layers))  # type: ignore[arg-type]
        self.head = copy.deepcopy(model.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(1)).squeeze(1)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    return linear


def run() -> dict[str, Any]:
    """Measure fp32 and bf16: `rows` (one a dtype; rates in GFLOP/s) and the three `ratios`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [measure(dtype, device) for dtype in (torch.float32, torch.bfloat16)]
    ratios = {
        "fp32_of_gemm_peak": rows[0]["of_gemm_peak"],
        "bf16_of_gemm_peak": rows[1]["of_gemm_peak"],
        "over_plain": rows[0]["over_plain"],
    }
    return {"name": "dense", "rows": rows, "ratios": ratios}


def measure(
    dtype: torch.dtype, device: torch.device, rounds: int = ROUNDS, step_seconds: float = STEP_SECONDS
) -> dict[str, Any]:
    """One row."""
    flop = sum(part.flop for part in count_wukong(EMBEDDINGS, CONFIG).values())
    quick = interleave({"gemm": _gemm(1024, 1024, 1024, dtype, device)}, repetitions=3, warmup=1)["gemm"]
    rate = _gemm_flop(1024, 1024, 1024) / min(quick)
    batch = max([size for size in BATCHES if size * flop <= step_seconds * rate], default=BATCHES[0])

    torch.manual_seed(0)
    model = Wukong(EMBEDDINGS, CONFIG)
    steps = {
        "wukong": _training_step(model, batch, dtype, device),
        "plain": _training_step(PlainWukong(model), batch, dtype, device),
    }
    widths = [EMBEDDINGS * RANK, *WIDTHS, NUM_FM * DIM]
    shapes = [(1024, 1024, 1024), (2048, 2048, 2048)] + [(batch, k, n) for k, n in itertools.pairwise(widths)]
    gemms = {f"{m}x{k}x{n}": (_gemm_flop(m, k, n), _gemm(m, k, n, dtype, device)) for m, k, n in shapes}

    contestants = steps | {name: gemm for name, (_, gemm) in gemms.items()}
    seconds = interleave(contestants, rounds, warmup=1)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    peak = {name: gemm_flop / median[name] / 1e9 for name, (gemm_flop, _) in gemms.items()}
    rates = {name: batch * flop / median[name] / 1e9 for name in steps}
    best = max(peak, key=lambda name: peak[name])
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "batch": batch,
        "forward_mflop_per_example": flop / 3e6,
        "gemm_peak": peak[best],
        "gemm_peak_shape": best,
        "wukong": rates["wukong"],
        "plain": rates["plain"],
        "wukong_step_ms": 1e3 * median["wukong"],
        "plain_step_ms": 1e3 * median["plain"],
        "of_gemm_peak": rates["wukong"] / peak[best],
        "over_plain": rates["wukong"] / rates["plain"],
    }


def _training_step(model: nn.Module, batch: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Forward, backward (down to X_0) and optimizer step on random data."""
    model = model.to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(batch, EMBEDDINGS, DIM, device=device).to(dtype).requires_grad_()
    labels = torch.randint(0, 2, (batch,), device=device).float()

    def step() -> None:
        with fast_cpu_gemm(device, dtype):
            logits = model(x).float()
        nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None
        _finish(device)

    return step


def _gemm(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    a = torch.randn(m, k, device=device).to(dtype)
    b = torch.randn(n, k, device=device).to(dtype)

    def multiply() -> None:
        with fast_cpu_gemm(device, dtype):
            nn.functional.linear(a, b)
        _finish(device)

    return multiply


def _gemm_flop(m: int, k: int, n: int) -> int:
    return 2 * m * k * n


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
