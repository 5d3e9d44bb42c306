"""Rows of the published ladder: the dense step alone on this device, and one true rank of a job of 256."""

from collections.abc import Callable

import torch

from megarec.config.sections import RunConfig
from megarec.data.batch import Batch
from megarec.data.schema import schema_of
from megarec.dense.parallelize import parallelize
from megarec.dense.side import DenseSide
from megarec.distributed.collectives import Ledger
from megarec.distributed.process import start_process
from megarec.distributed.topology import Topology, build_topology
from megarec.planning.fake_job import fake_job
from megarec.planning.held_memory import available_bytes
from megarec.planning.memory import with_totals
from megarec.planning.rehearse import make_batch
from megarec.planning.shrink import fit
from megarec.run.build import build_model
from megarec.run.spec import ModelSpec
from megarec.training.profiling import StepTimer, data_sheet_tflops, measure_gemm_tflops
from megarec.training.step import train_step
from tools.benchmarks.workload import quick_tables
from tools.gpu.context import ALONE, Context, forget, ladder_row, largest_allocation, seconds_of

RATE = 1e-4
PLAIN, FUSED = "train.fused_kernels=torch", "train.fused_kernels=auto"
VARIANTS = {  # compilers come last: they may use up the time
    "eager": (PLAIN, "dense.compile=false"),
    "Triton": (FUSED, "dense.compile=false"),  # the kernels of models/fused_fm.py, which have no prediction
    "compiled": (PLAIN, "dense.compile=true"),
}


def run_mfu(context: Context) -> None:
    """MFU of forward, backward and DeepSpeed's step; embeddings are existing random numbers."""
    failed = []
    for variant in VARIANTS if context.sizes.compiled else ("eager",):
        for row, examples in context.sizes.ladder:
            settings = (*VARIANTS[variant], f"data.batch_size={examples}")
            config, spec = ladder_row(context.sizes, row, *ALONE, *settings)
            try:
                _measure_row(context, f"{row} {variant}", config, spec)
            except Exception as error:  # out of memory, a failing compiler: keep the other rows
                failed.append(f"{row} {variant}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                context.emit(f"{row} {variant}", "failed")
            forget(context.device)
    assert not failed, "; ".join(failed)


def _measure_row(context: Context, name: str, config: RunConfig, spec: ModelSpec) -> None:
    device = start_process(config)
    dense = parallelize(spec.meta_model(), config, build_topology(1, 1), device, Ledger())
    dense.set_learning_rate(RATE)
    examples = config.data.batch_size
    seconds = seconds_of(dense_step(dense, spec, examples, device), device, context.sizes.repeats, warmup=3)
    peak = data_sheet_tflops(dense.dtype, device) or measure_gemm_tflops(dense.dtype, device)
    context.emit(f"{name} MFU", 100 * spec.cost.flop * examples / seconds / peak / 1e12, "%")
    context.emit(f"{name} step of {examples:,}", 1e3 * seconds, "ms")
    if (most := largest_allocation(device)) is not None:
        context.emit(f"{name} memory", most / 2**30, "GiB")
    dense.engine.destroy()


def dense_step(dense: DenseSide, spec: ModelSpec, examples: int, device: torch.device) -> Callable[[], object]:
    """One step of the dense side on random examples."""
    batch = Batch(
        torch.randn(examples, spec.numeric),
        {},
        torch.randint(0, 2, (examples,)).float(),
        torch.arange(examples),
        examples,
    ).to(device)
    values = torch.randn(examples, spec.columns.width, device=device, dtype=dense.dtype)

    def step() -> None:
        dense.forward_backward(0, batch, values)
        dense.apply()

    return step


def run_true_rank(context: Context) -> None:
    """Rank 0 of a larger job, whose other ranks are torch's fake group: a step without communication, and memory."""
    hosts, per_host = context.sizes.job
    for row in context.sizes.rows:
        tensor = [] if per_host % 8 == 0 else ["parallel.tensor=1", "data.batch_size=16"]
        config, _ = ladder_row(context.sizes, row, *tensor)
        _measure_rank(context, row, config, hosts, per_host)
        forget(context.device)


def _measure_rank(context: Context, row: str, config: RunConfig, hosts: int, per_host: int) -> None:
    device = context.device
    bare = Topology(0, hosts * per_host, per_host, config.parallel.tensor)
    fitted = fit(config, schema_of(config.data), bare, available_bytes(device), device)
    with fake_job(0, hosts * per_host), quick_tables(device):
        device = start_process(config)
        topology = build_topology(per_host, config.parallel.tensor)
        model = build_model(fitted.config, fitted.spec, topology, device, fitted.shards)
        clock = StepTimer(device)
        clock.sampled = False
        batch = make_batch(fitted.schema, fitted.micro_batch * model.dense.accumulation, seed=0).to(device)
        seconds = seconds_of(
            lambda: train_step(model.dense, model.sparse, batch, timer=clock), device, context.sizes.repeats, warmup=3
        )
        most = largest_allocation(device)
        model.dense.engine.destroy()
    context.emit(f"{row} step, rank 0 of {hosts * per_host}, {batch.size:,} examples", 1e3 * seconds, "ms")
    predicted = with_totals(fitted.predicted)["total"] - fitted.predicted["runtime"]
    context.emit(f"{row} memory predicted by megarec rehearse", predicted / 2**30, "GiB")
    if most is not None:
        context.emit(f"{row} memory", most / 2**30, "GiB")
