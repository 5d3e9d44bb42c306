"""Activation checkpointing: what each policy keeps for the backward pass and what it costs, in one process.

The dense model of the 1.25-GFLOP ladder row in fp32; forward and backward down to X_0, the policies in turns.
"""

import ctypes
import gc
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from megarec.config.models import WukongConfig
from megarec.dense.layers import Recompute, recompute_layers
from megarec.models.wukong import Wukong
from tools.benchmarks.interleave import interleave

EMBEDDINGS, BATCH, REPETITIONS = 723, 64, 5
MODEL = WukongConfig(dim=160, layers=4, num_fm=32, num_lcb=32, rank=24, mlp=[2048] * 3, head=[2048])


def run() -> dict[str, Any]:
    """MiB kept and milliseconds a step by policy; both over those of `none`."""
    return measure(MODEL, EMBEDDINGS, BATCH, REPETITIONS)


def measure(config: WukongConfig, embeddings: int, batch: int, repetitions: int) -> dict[str, Any]:
    steps, kept = {}, {}
    for policy in get_args(Recompute):
        steps[policy], kept[policy] = _step(config, embeddings, batch, policy)
    seconds = {name: statistics.median(times) for name, times in interleave(steps, repetitions, warmup=1).items()}
    rows = [
        {"policy": name, "batch": batch, "kept_mib": kept[name] / 2**20, "step_ms": 1e3 * seconds[name]}
        for name in steps
    ]
    ratios = {}
    for name in ("selective", "full"):
        ratios[f"{name}_kept"] = kept[name] / kept["none"]
        ratios[f"{name}_time"] = seconds[name] / seconds["none"]
    return {"name": "recompute", "rows": rows, "ratios": ratios}


def _step(config: WukongConfig, embeddings: int, batch: int, policy: Recompute) -> tuple[Callable[[], None], int]:
    """A training step without the optimizer, and the bytes that its forward pass keeps."""
    torch.manual_seed(0)
    model = Wukong(embeddings, config)
    recompute_layers(model, policy)
    x = torch.randn(batch, embeddings, config.dim, requires_grad=True)

    def step() -> None:
        model(x).sum().backward()
        model.zero_grad()
        x.grad = None

    step()
    before = _resident_bytes()
    logits = model(x)
    kept = _resident_bytes() - before
    del logits
    return step, kept


def _resident_bytes() -> int:
    """Memory of this process, after what is freed went back to the system; hooks on saved tensors would miss some."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
