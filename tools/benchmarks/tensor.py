"""Tensor parallelism against data parallelism: the same dense step on the same two ranks, at equal global batch.

The dense model of the 1.25-GFLOP ladder row under DeepSpeed ZeRO-2, fp32 and bf16: forward, backward down to X_0,
gradient reduction, AdamW step, communication included. Both run in the same rank processes in turns; a step takes as
long as its slower rank. Their losses are compared on the way: they train the same model on the same examples.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits

from megarec.config.models import WukongConfig
from megarec.config.sections import RunConfig
from megarec.dense.parallelize import parallelize
from megarec.distributed.collectives import Ledger
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import build_topology
from megarec.models.cpu_gemm import fast_cpu_gemm
from megarec.models.wukong import Wukong
from tools.benchmarks.interleave import interleave

EMBEDDINGS, RANKS, BATCH, REPETITIONS = 723, 2, 64, 5
MODEL = WukongConfig(dim=160, layers=4, num_fm=32, num_lcb=32, rank=24, mlp=[2048] * 3, head=[2048])
WAYS = {"data parallel": 1, "tensor parallel": RANKS}


def run() -> dict[str, Any]:
    """Milliseconds a step and MiB a rank sends for tensor parallelism; tensor over data parallel in fp32 and bf16."""
    rows, ratios = [], {}
    with RankPool(RANKS, timeout=900) as pool:
        for precision in ("fp32", "bf16"):
            by_rank = pool.run(compare, MODEL, EMBEDDINGS, BATCH, REPETITIONS, precision == "bf16")
            medians = {
                name: statistics.median(map(max, zip(*(rank["seconds"][name] for rank in by_rank), strict=True)))
                for name in WAYS
            }
            for name in WAYS:
                row = {"variant": name, "dtype": precision, "ranks": RANKS, "global_batch": BATCH * RANKS}
                rows.append(row | {"step_ms": 1e3 * medians[name], "tensor_mib_sent": by_rank[0]["mib"][name]})
            ratios[f"{precision}_tensor_over_data_parallel"] = medians["tensor parallel"] / medians["data parallel"]
    return {"name": "tensor", "rows": rows, "ratios": ratios}


def compare(model: WukongConfig, embeddings: int, batch: int, repetitions: int, bf16: bool) -> dict[str, Any]:
    """On every rank: seconds of each step, and MiB sent a step over the tensor group, by variant.

    Raises:
        AssertionError: the variants' losses part, so one of them does not do the work.
    """
    ledgers = {name: Ledger() for name in WAYS}
    losses: dict[str, list[float]] = {name: [] for name in WAYS}
    steps = {
        name: _training_step(model, embeddings, batch, ways, bf16, ledgers[name], losses[name])
        for name, ways in WAYS.items()
    }
    seconds = interleave(steps, repetitions, warmup=2, before=dist.barrier)
    for ours, theirs in zip(*losses.values(), strict=True):
        assert abs(ours - theirs) <= (0.05 if bf16 else 1e-4) * abs(theirs), (ours, theirs)
    done = repetitions + 2
    sent = {name: sum(row["bytes"] for row in ledger.rows()) / done / 2**20 for name, ledger in ledgers.items()}
    return {"seconds": seconds, "mib": sent}


def _training_step(
    model: WukongConfig, embeddings: int, batch: int, ways: int, bf16: bool, ledger: Ledger, losses: list[float]
) -> Callable[[], None]:
    """One step over `batch` random examples of this rank, the same for every variant; appends the mean loss."""
    config = RunConfig.model_validate(
        {
            "model": model.model_dump(),
            "data": {"path": "", "batch_size": batch * dist.get_world_size()},
            "dense": {"eps": 1e-3},  # at 1e-8 Adam makes full steps of rounding noise, and losses part
            "parallel": {"tensor": ways},
            "deepspeed": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": bf16}},
        }
    )
    device = start_process(config)
    with torch.device("meta"):
        over_arch = Wukong(embeddings, model)
    topology = build_topology(dist.get_world_size(), ways)
    dense = parallelize(over_arch, config, topology, device, ledger)
    dense.set_learning_rate(1e-4)
    dtype, engine = dense.dtype, dense.engine
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(batch, embeddings, model.dim, generator=generator).to(device, dtype).requires_grad_()
    labels = torch.randint(0, 2, (batch,), generator=generator).float().to(device)

    def step() -> None:
        with fast_cpu_gemm(device, dtype):
            logits = engine(x).float()
        loss = binary_cross_entropy_with_logits(logits, labels)
        engine.backward(loss)
        engine.step()
        x.grad = None
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())

    return step
