"""Rehearsal: this process becomes one true rank of a larger job, and runs a few of its steps.

The other ranks are torch's fake process group (fake_job.py). Everything of this rank is real: its shards of the dense
layers under tensor parallelism and ZeRO, its tables, the engine, the exchange. What arrives from other ranks is made
up, and so are the examples: a rehearsal measures memory, operations and collectives. Losses would mean nothing.

Memory is that of this process where it computes: the accelerator's, or the machine's (held_memory.py).
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megarec.checkpoint.sparse import tables_written, towers_written
from megarec.config.sections import RunConfig
from megarec.data.batch import Batch, Ids
from megarec.data.schema import Schema
from megarec.dense.masters import optimizer_of
from megarec.dense.memory import Parts, saved_activations
from megarec.dense.side import DenseSide
from megarec.distributed.process import give_back_freed_memory, rank_device, start_process
from megarec.distributed.topology import Topology, build_topology, check_divides, check_job
from megarec.errors import UserError
from megarec.models.cpu_gemm import fast_cpu_gemm
from megarec.planning.exchange_meter import ExchangeMeter, exchange_measured
from megarec.planning.fake_job import fake_job
from megarec.planning.held_memory import available_bytes, forget_peak, peak_parts, resident_bytes
from megarec.planning.memory import MODEL_STATES, with_totals
from megarec.planning.recorder import CollectiveRecorder
from megarec.planning.shrink import Fit, fit
from megarec.run.averages import Averages
from megarec.run.build import Model, build_model, overlaps
from megarec.sparse.exchange.group import Distributed
from megarec.sparse.towers.replicas import TowerReplicas
from megarec.training.profiling import StepTimer
from megarec.training.step import train_step

LONGEST_LIST = 5  # a list holds 0 .. 5 ids, as the synthetic data do
STEPS = 3  # ZeRO-3 learns the order of the modules in the first step and checks it in the second


def make_batch(schema: Schema, size: int, seed: int) -> Batch:
    """`size` examples with ids spread evenly over the rows."""
    random = torch.Generator().manual_seed(seed)
    ids = {}
    for feature in schema.categorical:
        lengths, weights = None, None
        total = size
        if feature.multi_valued:
            lengths = torch.randint(0, LONGEST_LIST + 1, (size,), generator=random)
            total = int(lengths.sum())
        values = torch.randint(0, feature.rows, (total,), generator=random)
        if feature.weighted:
            weights = torch.rand(total, generator=random)
        ids[feature.name] = Ids(values, lengths, weights)
    labels = (size, len(schema.tasks)) if schema.tasks else (size,)
    return Batch(
        numeric=torch.randn(size, len(schema.numeric), generator=random),
        ids=ids,
        labels=torch.randint(0, 2, labels, generator=random).float(),
        keys=torch.arange(size),
        valid=size,
        weights=torch.ones(size) if schema.weighted else None,
        some_missing=not schema.complete,
    )


@dataclass(frozen=True)
class Rehearsal:
    """What one rank did in its last step, beside what was predicted.

    Attributes:
        fit: what was rehearsed.
        peak: measured bytes by part, as planning/memory.py names them; `process` is the interpreter with its
            libraries, and `total` the peak of the process's resident memory; on an accelerator of its allocator, with
            the `runtime`, beside which `cached` was held in vain.
        predicted: the same, predicted for what was rehearsed; `predicted_real`: for the run's own batch and tables.
        executed_flop, counted_flop: of this rank, by torch's counter and by run/cost.py.
        collectives: of this rank; see planning/recorder.py.
        choices: what was chosen and why, for what was rehearsed.
    """

    topology: Topology
    fit: Fit
    peak: Parts
    predicted: Parts
    predicted_real: Parts
    executed_flop: int
    counted_flop: int
    collectives: list[dict[str, Any]]
    choices: tuple[str, ...]
    wall_seconds: float


def rehearse(config: RunConfig, schema: Schema, hosts: int, ranks_per_host: int, rank: int) -> Rehearsal:
    """Become rank `rank` of hosts x ranks_per_host ranks and run some steps; there must be no process group yet.

    Raises:
        UserError: ranks, batch, tensor parallelism or tables do not fit together, or the rank does not fit this
            machine; all before anything large is built.
    """
    started = time.perf_counter()
    check_ranks(config, hosts, ranks_per_host, rank)
    bare = Topology(rank, hosts * ranks_per_host, ranks_per_host, config.parallel.tensor)
    device = rank_device()
    fitted = fit(config, schema, bare, available_bytes(device), device)
    with fake_job(rank, hosts * ranks_per_host):
        device = start_process(config)
        give_back_freed_memory()  # what a run keeps for speed would count as in use here
        topology = build_topology(ranks_per_host, config.parallel.tensor)
        process = resident_bytes() if device.type == "cpu" else 0
        forget_peak(device)
        model = build_model(fitted.config, fitted.spec, topology, device, fitted.shards)
        averages = Averages(fitted.config.train.ema, model.dense, model.sparse, fitted.spec.layout)
        peak, flop, collectives = run_steps(fitted, model, topology, device)
        peak |= {**peak_parts(device, process), "averages": averages.memory_bytes()}
        peak["snapshot"] = _snapshot_bytes(fitted, model, topology, averages)
    peak |= {"model_states": sum(peak[part] for part in MODEL_STATES)}
    examples = fitted.micro_batch * model.dense.accumulation
    return Rehearsal(
        topology=topology,
        fit=fitted,
        peak=peak,
        predicted=with_totals({**fitted.predicted, "process": process}),
        predicted_real=with_totals({**fitted.predicted_real, "process": process}),
        executed_flop=flop,
        counted_flop=fitted.cost.flop * examples,
        collectives=collectives,
        choices=model.choices,
        wall_seconds=time.perf_counter() - started,
    )


def _snapshot_bytes(fitted: Fit, model: Model, topology: Topology, averages: Averages) -> int:
    """What a checkpoint would copy of this rank."""
    pieces = model.dense.written() + tables_written(model.sparse, fitted.spec.layout, topology)
    if model.sparse.modules is not None:
        pieces += towers_written(model.sparse.modules, topology, fitted.config.parallel.exchange)
    averaged = [*averages.tables.values(), *averages.modules.values()]
    if averages:
        pieces += model.dense.laid_out(averages.of_master, to_write=True)
    return sum(piece.tensor.nbytes for piece in pieces) + sum(tensor.nbytes for tensor in averaged)


def check_ranks(config: RunConfig, hosts: int, ranks_per_host: int, rank: int) -> None:
    """Raise a UserError where the command line makes no job, or another one than the config."""
    check_job(hosts, ranks_per_host)
    world_size = hosts * ranks_per_host
    if not 0 <= rank < world_size:
        raise UserError(f"--rank {rank}: {hosts} hosts x {ranks_per_host} ranks have the ranks 0 to {world_size - 1}")
    if config.parallel.ranks_per_host not in (None, ranks_per_host):
        raise UserError(
            f"--ranks-per-host {ranks_per_host}, but the config has parallel.ranks_per_host="
            f"{config.parallel.ranks_per_host}; make them equal"
        )
    check_divides(world_size, ranks_per_host, config.parallel.tensor)


def run_steps(
    fitted: Fit, model: Model, topology: Topology, device: torch.device
) -> tuple[Parts, int, list[dict[str, Any]]]:
    """Run STEPS steps; the parts at their peaks, and of the last step the FLOPs and the collectives.

    Where a run overlaps, the ids of the next batch travel within a step; here its own thread sends them.
    """
    peak: Parts = {"tables": model.sparse.memory_bytes(), "towers": 0}
    dense, sparse, meter = model.dense, model.sparse, ExchangeMeter()
    ahead, on_cpu = overlaps(fitted.config, topology, device), device.type == "cpu"
    seeds, ready = itertools.count(), list[tuple[Batch, Distributed | None]]()

    def observe(messages: list[Tensor]) -> None:
        if not meter.watching:  # else they are the exchange's
            _raise(peak, dense, messages)

    def start() -> None:
        batch = make_batch(fitted.schema, fitted.micro_batch * dense.accumulation, seed=next(seeds)).to(device)
        ready.append((batch, sparse.distribute(batch) if ahead else None))

    recorder = CollectiveRecorder(topology, observe)
    # ZeRO-3 has a backward pass of its own for linear layers, outside of the model's own products.
    measured = _measured(peak, dense, meter), _towers_measured(peak, sparse.modules, meter)
    with (
        recorder,
        meter,
        fast_cpu_gemm(device, dense.dtype),
        measured[0],
        measured[1],
        exchange_measured(meter, sparse),
    ):
        start()
        recorder.take()
        for step in range(STEPS):
            batch, ids = ready.pop()
            after_lookup, meanwhile = (start, _nothing) if on_cpu else (_nothing, start)
            last = step + 1 == STEPS
            if last:
                peak["exchange"] = meter.peak  # the counter's hooks keep gradients
            with FlopCounterMode(display=False) if last else nullcontext(FlopCounterMode()) as counter:
                train_step(
                    dense, sparse, batch,
                    timer=StepTimer(device), ids=ids, after_lookup=after_lookup, meanwhile=meanwhile,
                )  # fmt: skip
            collectives = recorder.take()
    return peak, counter.get_total_flops(), collectives


def _nothing() -> None:
    """To be done."""


def _raise(peak: Parts, dense: DenseSide, messages: list[Tensor]) -> None:
    """At a collective, a gradient that arrives, or a step of the optimizer: what rises and falls within a step."""
    now = dense.memory_bytes(messages)
    for part in ("communication", "step"):
        peak[part] = max(peak.get(part, 0), now[part])


@contextmanager
def _measured(peak: Parts, dense: DenseSide, meter: ExchangeMeter) -> Iterator[None]:
    """Measure activations at the end of every forward pass, model states at the end of every backward pass."""
    engine = dense.engine
    forward, step = engine.forward, engine.step

    def measured_forward(*inputs: Any) -> Any:
        kept: dict[str, int] = {}
        with saved_activations(kept, dense.module) as saved:
            out = forward(*inputs)
        meter.leave_out("activations", saved)
        peak["activations"] = max(peak.get("activations", 0), kept["bytes"])
        return out

    def measured_step() -> None:
        now = dense.memory_bytes()
        peak.update({part: now[part] for part in MODEL_STATES})
        step()

    hooks: list[Any] = [optimizer_of(engine).register_step_pre_hook(lambda *_: _raise(peak, dense, []))]
    for parameter in dense.module.parameters():  # at ZeRO 1 their gradients wait until all are there
        hooks.append(parameter.register_post_accumulate_grad_hook(lambda _: _raise(peak, dense, [])))
    with patch.object(engine, "forward", measured_forward), patch.object(engine, "step", measured_step):
        yield
    for hook in hooks:
        hook.remove()


@contextmanager
def _towers_measured(peak: Parts, modules: TowerReplicas | None, meter: ExchangeMeter) -> Iterator[None]:
    """Measure what tower modules hold: all of theirs at the end of a step, their gradients, and what they save."""
    if modules is None:
        yield
        return
    forward, kept, gradients = modules.bank.forward, {"bytes": 0}, dict[nn.Parameter, int]()

    def measured_forward(x: Tensor) -> Tensor:
        with meter.pause(), saved_activations(kept) as saved:
            made: Tensor = forward(x)
        meter.take(made)
        meter.leave_out("towers", saved)
        return made

    def keep(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        gradients[parameter] = parameter.grad.nbytes

    hooks = [parameter.register_post_accumulate_grad_hook(keep) for parameter in modules.bank.parameters()]
    with patch.object(modules.bank, "forward", measured_forward):
        yield
    for hook in hooks:
        hook.remove()
    peak["towers"] = modules.memory_bytes() + sum(gradients.values()) + kept["bytes"]
