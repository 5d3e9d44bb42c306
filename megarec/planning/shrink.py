"""What of a rank this machine can rehearse: how many examples, and how much of its tables."""

from dataclasses import dataclass, replace

import torch

from megarec.config.deepspeed import MONITORS, micro_batch_size
from megarec.config.sections import RunConfig
from megarec.data.schema import Schema
from megarec.dense.memory import Parts
from megarec.distributed.topology import Topology
from megarec.errors import UserError
from megarec.planning.memory import CPU, predict, with_totals
from megarec.run.cost import Cost
from megarec.run.spec import ModelSpec, resolve
from megarec.sparse.placement import Shard, even_ranges, split_by_rows
from megarec.sparse.run_placement import place_run
from megarec.sparse.tables.optimizers import table_bytes

# A step of some seconds on a CPU that does 50 GFLOP/s, and of one second on an accelerator: a rank has as many examples
# as that allows.
STEP_FLOP, STEP_FLOP_OF_ACCELERATOR = 250e9, 5e14
CUT_TABLES = 2**30  # bytes that the tables of a rank are cut to where they do not fit
BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu")


@dataclass(frozen=True)
class Fit:
    """A rank as it is rehearsed.

    Attributes:
        cost: of the run itself.
        config, schema, spec, shards: those of the run, with fewer examples and shorter tables where that is needed.
        micro_batch: examples of the rank in a micro-batch; `real_micro_batch` is the run's own.
        table_rows: rows at which every table is cut off; None: all are whole.
        predicted: bytes by part of what is rehearsed; `predicted_real`: of the run's own batch and tables.
    """

    cost: Cost
    config: RunConfig
    schema: Schema
    spec: ModelSpec
    shards: tuple[Shard, ...]
    micro_batch: int
    real_micro_batch: int
    table_rows: int | None
    predicted: Parts
    predicted_real: Parts


def fit(config: RunConfig, schema: Schema, topology: Topology, available: int, device: torch.device = CPU) -> Fit:
    """Choose examples by the cost of a step, and cut the tables only where the rank would not fit into memory.

    Args:
        config: every size explicit or derived by `model.scale`.
        topology: the job and the rank; its groups are not looked at.
        available: bytes that this process may still take, where it computes.

    Raises:
        UserError: batch, ranks and tables do not fit together, or the rank does not fit even with cut tables.
    """
    spec = resolve(config, schema)
    cost, config = spec.cost, config.model_copy(update={"model": spec.sizes})
    real = micro_batch_size(config, topology.world_size)
    accumulation = config.deepspeed.get("gradient_accumulation_steps", 1)
    flop = STEP_FLOP if device.type == "cpu" else STEP_FLOP_OF_ACCELERATOR
    affordable = int(flop // (cost.flop * accumulation))
    micro = max(1, min(real, affordable))
    small = _with_batch(config, micro * accumulation * topology.world_size)

    shards = place_run(config, spec.layout, spec.towers, topology)
    predicted_real = predict(config, spec, topology, real, shards, device)
    predicted = predict(small, spec, topology, micro, shards, device, connected=False)
    rows = None
    if with_totals(predicted)["total"] > available:
        rows = longest(shards, topology.rank, small, CUT_TABLES)
        schema, shards = cut_schema(schema, rows), cut_shards(shards, rows)
        spec = resolve(small, schema)
        predicted = predict(small, spec, topology, micro, shards, device, connected=False)
        _check_fits(predicted, available, topology)
    return Fit(cost, small, schema, spec, shards, micro, real, rows, predicted, predicted_real)


def longest(shards: tuple[Shard, ...], rank: int, config: RunConfig, budget: int) -> int:
    """The most rows at which tables can be cut off so that the shards of a rank take at most `budget` bytes.

    At least one, and one for every rank that shares the rows of a table.
    """
    by_rows = split_by_rows(shards)
    low = max([1, *(1 + shard.rank for shard in shards if shard.table in by_rows)])
    high = max([low, *(shard.row_stop for shard in shards)])
    while low < high:
        middle = (low + high + 1) // 2
        own = [shard for shard in cut_shards(shards, middle) if shard.rank == rank]
        if table_bytes(own, config.embedding) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def cut_shards(shards: tuple[Shard, ...], rows: int) -> tuple[Shard, ...]:
    """The shards of tables cut off at `rows`; rows that ranks share are shared again, evenly."""
    by_rows = split_by_rows(shards)
    stops = {name: max(s.row_stop for s in shards if s.table == name) for name in by_rows}
    parts = {name: sum(s.table == name for s in shards) for name in by_rows}
    ranges = {name: iter(even_ranges(min(rows, stops[name]), parts[name])) for name in by_rows}

    def cut(shard: Shard) -> Shard:
        start, stop = next(ranges[shard.table]) if shard.table in by_rows else (0, min(shard.row_stop, rows))
        return replace(shard, row_start=start, row_stop=stop)

    return tuple(cut(shard) for shard in shards)


def cut_schema(schema: Schema, rows: int) -> Schema:
    cut = tuple(f.model_copy(update={"rows": min(f.rows, rows)}) for f in schema.categorical)
    return schema.model_copy(update={"categorical": cut})


def _with_batch(config: RunConfig, batch_size: int) -> RunConfig:
    left_out = (*MONITORS, *BATCH_SIZES)
    section = {key: value for key, value in config.deepspeed.items() if key not in left_out}
    data = config.data.model_copy(update={"batch_size": batch_size})
    return config.model_copy(update={"data": data, "deepspeed": section})


def _check_fits(predicted: Parts, available: int, topology: Topology) -> None:
    totals = with_totals(predicted)
    if totals["total"] > available:
        listed = ", ".join(f"{part} {size / 2**30:.1f}" for part, size in totals.items() if part in predicted)
        raise UserError(
            f"rank {topology.rank} of {topology.world_size} needs {totals['total'] / 2**30:.1f} GiB with its tables "
            f"cut to {CUT_TABLES / 2**30:.0f} GiB, but {available / 2**30:.1f} GiB are available here ({listed}): "
            "rehearse it with more ranks, a higher ZeRO stage or parallel.tensor, or smaller deepspeed buckets"
        )
