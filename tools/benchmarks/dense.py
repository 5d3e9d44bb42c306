"""The dense model beside the machine's GEMM peak and beside a plain implementation, in one process.

Two models: one of 41 MFLOP forward per example, and the 1.25-GFLOP row of the published ladder, at the largest batch
whose step stays in 4 GiB; on a GPU both at 16,384 examples, timed by its own clock. A row is one model in one dtype:
forward, backward and optimizer step, parameters and activations in that dtype, optimizer state in fp32. The peak is the
best of several GEMMs in that dtype, square and of the model's own shapes. GEMMs and models take turns, so that a busy
machine slows them alike, and medians count. All use the same threads, the same allocator and the same products
(megarec.models.cpu_gemm: on CPUs without bf16 instructions, bf16 products through fp32). Where there is a compiler, the
model with `dense.compile` takes its turn as well.
"""

import copy
import itertools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from megarec.config.models import WukongConfig
from megarec.config.sections import DenseConfig
from megarec.dense.layers import compile_layers, has_compiler
from megarec.distributed.process import keep_freed_memory
from megarec.models.cpu_gemm import fast_cpu_gemm
from megarec.models.wukong import Wukong, layer_sizes
from megarec.run.cost import count_wukong, total
from tools.benchmarks.dense_step import largest_batch, training_step
from tools.benchmarks.interleave import interleave
from tools.benchmarks.plain import PlainWukong

MEMORY_LIMIT = 4 * 2**30
SQUARES = {"cpu": (1024, 2048), "gpu": (4096, 8192)}
GPU_BATCH, GPU_ROUNDS = 16_384, 15  # below, most of a GPU would wait


class Case(NamedTuple):
    """A model, and how it is measured.

    Attributes:
        embeddings: n of X_0.
        rounds: turns that count.
        batch: fixed; None: the largest whose step stays in 4 GiB.
        compiled: whether the model with `dense.compile` takes its turn.
    """

    name: str
    embeddings: int
    config: WukongConfig
    rounds: int
    batch: int | None
    compiled: bool = False


SMALL = Case(
    "41 MFLOP",
    128,
    WukongConfig(dim=64, layers=4, num_fm=32, num_lcb=32, rank=24, mlp=[896] * 2, head=[256]),
    7,
    1024,
    compiled=True,
)
LADDER = Case(
    "1.25 GFLOP",
    723,
    WukongConfig(dim=160, layers=4, num_fm=32, num_lcb=32, rank=24, mlp=[2048] * 3, head=[2048]),
    3,
    None,
    compiled=True,
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run() -> dict[str, Any]:
    """Measure both models in fp32 and bf16: `rows` (rates in GFLOP/s) and the `ratios`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    rows = {
        (case.name, name): measure(sized(case, device), dtype, device)
        for case in (SMALL, LADDER)
        for name, dtype in DTYPES.items()
    }
    small, ladder = ({dtype: rows[case.name, dtype] for dtype in DTYPES} for case in (SMALL, LADDER))
    ratios = {
        "fp32_of_gemm_peak": small["fp32"]["of_gemm_peak"],
        "bf16_of_gemm_peak": small["bf16"]["of_gemm_peak"],
        "over_plain": small["fp32"]["over_plain"],
        "bf16_over_plain": small["bf16"]["over_plain"],
        "row_1.25_fp32_of_gemm_peak": ladder["fp32"]["of_gemm_peak"],
        "row_1.25_bf16_of_gemm_peak": ladder["bf16"]["of_gemm_peak"],
        "row_1.25_fp32_over_plain": ladder["fp32"]["over_plain"],
        "row_1.25_over_plain": ladder["bf16"]["over_plain"],
    }
    for (name, dtype), row in rows.items():
        if "compiled_over_eager" in row:
            ratios[f"{name}_{dtype}_compiled_over_eager".replace(" ", "_")] = row["compiled_over_eager"]
    return {"name": "dense", "rows": list(rows.values()), "ratios": ratios}


def sized(case: Case, device: torch.device) -> Case:
    """A case as the device wants it."""
    return case if device.type == "cpu" else case._replace(batch=GPU_BATCH, rounds=GPU_ROUNDS)


def measure(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """One row."""
    n, config = case.embeddings, case.config
    memory: dict[str, int] = {}
    batch = case.batch
    if batch is None:
        batch, memory["peak_bytes"] = largest_batch(n, config, dtype, device, MEMORY_LIMIT)

    torch.manual_seed(0)
    model = Wukong(n, config)
    models: dict[str, nn.Module] = {"wukong": model, "plain": PlainWukong(model)}
    if case.compiled and has_compiler(device):
        models["compiled"] = copy.deepcopy(model)
        compile_layers(models["compiled"], DenseConfig(compile=True), {}, device)
    steps = {name: training_step(m, n, config.dim, batch, dtype, device) for name, m in models.items()}
    gemms = {
        f"{m}x{k}x{o}": (2 * m * k * o, _gemm(m, k, o, dtype, device)) for m, k, o in _shapes(n, config, batch, device)
    }
    seconds = interleave(
        steps | {name: gemm for name, (_, gemm) in gemms.items()}, case.rounds, warmup=1, device=device
    )
    median = {name: statistics.median(times) for name, times in seconds.items()}
    peak = {name: flop / median[name] / 1e9 for name, (flop, _) in gemms.items()}
    best = max(peak, key=lambda name: peak[name])
    flop = total(count_wukong(n, config)).flop
    rates = {name: batch * flop / median[name] / 1e9 for name in steps}
    return {
        "model": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "batch": batch,
        **memory,
        "forward_mflop_per_example": flop / 3e6,
        "gemm_peak": peak[best],
        "gemm_peak_shape": best,
        **rates,
        **{f"{name}_step_ms": 1e3 * median[name] for name in steps},
        "of_gemm_peak": rates["wukong"] / peak[best],
        "over_plain": rates["wukong"] / rates["plain"],
        **({"compiled_over_eager": rates["compiled"] / rates["wukong"]} if "compiled" in rates else {}),
    }


def _shapes(n: int, config: WukongConfig, batch: int, device: torch.device) -> list[tuple[int, int, int]]:
    """GEMMs that may reach the peak: square ones of the device's size, and the forward products of the MLPs."""
    sizes = layer_sizes(n, config)
    widths = [[s.inputs * s.rank, *s.mlp, s.num_fm * config.dim] for s in sizes]
    own = {(batch, k, o) for layer in widths for k, o in itertools.pairwise(layer)}
    return [*((size,) * 3 for size in SQUARES["cpu" if device.type == "cpu" else "gpu"]), *sorted(own)]


def _gemm(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    a = torch.randn(m, k, device=device).to(dtype)
    b = torch.randn(n, k, device=device).to(dtype)

    def multiply() -> None:
        with fast_cpu_gemm(device, dtype):
            nn.functional.linear(a, b)

    return multiply
