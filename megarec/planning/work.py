"""What a rank does in a step, whatever the machine: operations, bytes in memory, messages.

Operations are those that the modules start (roofline.py), messages the ledger's (traffic.py), bytes of the optimizer's
step those that DeepSpeed moves. step_time.py says how long it takes on a machine.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megarec.config.deepspeed import micro_batch_size
from megarec.config.sections import RunConfig
from megarec.dense.reduction import BUCKETS
from megarec.distributed.topology import Topology
from megarec.errors import UserError
from megarec.planning import roofline
from megarec.planning.dense_traffic import dense_messages
from megarec.planning.hardware import TableKind
from megarec.planning.memo import Same, remembered
from megarec.planning.memory import average_bytes
from megarec.planning.skew import Reads
from megarec.planning.table_loads import Load, loads
from megarec.planning.table_work import RankWork, table_work
from megarec.planning.traffic import Message, mean_ids, placed, sparse_messages
from megarec.planning.zero import Zero, zero_of
from megarec.planning.zero_traffic import DenseSent, dense_sent
from megarec.run.spec import ModelSpec
from megarec.sparse.placement import Shard

AVERAGED = 3  # an average is read and written, and its weight read
LOOKED_AT = 8  # ranks with most columns, and with fewest, of a large job
SPTT_COPY_BYTES = 16, 8
"""Read and written once more by SPTT than by flat, both ways, for a column of an example: in fp32, and in 16 bits."""


@dataclass(frozen=True)
class Work:
    """What a rank does in a step, whatever the machine.

    Attributes:
        topology: the job and the rank that sends most to other hosts.
        dense, towers: operations of the dense model in a micro-batch, and of the rank's tower modules.
        messages: of the sparse side.
        sent: bytes for gradients and weights of the dense model; `tensor` those of the tensor-parallel layers.
        overlap: whether messages travel while the rank computes; None: as the machine decides (run/build.py).
        buckets: messages that carry the dense gradients.
        dense_messages: of the dense side, as far as the ledger counts them.
        labels: whether they are several: ranks then tell each other which losses are finite, in each micro-batch.
        early: whether these leave while the backward pass still computes.
        moved: bytes in memory by what is done; ids spread evenly over the rows.
        reads: lookups of each table by all ranks.
        tables: by rank, what a CPU does for the tables that lie there; None: `moved` says it.
    """

    topology: Topology
    width: int
    accumulation: int
    dense: list[roofline.Op]
    towers: list[roofline.Op]
    compression: float | None
    messages: list[Message]
    sent: DenseSent
    tensor: list[float]
    stage: int
    overlap: bool | None
    buckets: int
    labels: bool
    early: bool
    dense_messages: list[Message]
    moved: dict[str, int]
    reads: tuple[Reads, ...]
    launches: int
    flop: int
    tables: tuple[RankWork, ...] | None = None


def work_of(
    config: RunConfig,
    spec: ModelSpec,
    hosts: int,
    ranks_per_host: int,
    shards: Sequence[Shard] | None = None,
    slowest: bool = False,
    kinds: Collection[TableKind] = (),
) -> Work:
    """A step of the rank that sends most to other hosts.

    Args:
        shards: where all tables lie (`traffic.placed` is enough); None: as the config places them.
        slowest: lookups, updates and each message of the sparse side are those of the rank that has most of them, for
            which the others wait; else a rank's mean and the messages of one rank.
        kinds: of work on tables that a CPU's costs are known of; none: what they move is enough.

    Raises:
        UserError: ranks, batch and tables do not fit together.
    """
    world, tensor = hosts * ranks_per_host, config.parallel.tensor
    first = Topology(0, world, ranks_per_host, tensor)
    micro, zero = micro_batch_size(config, world), zero_of(config, first)
    if zero.offloaded:
        raise UserError("plan: deepspeed.zero_optimization.offload_optimizer is not in its model; leave it out")
    batch, sizes = config.data.batch_size // world, roofline.parameter_sizes(spec, first)
    shards = placed(config, spec, first) if shards is None else shards
    messages, topology = busiest(config, spec, first, shards)
    towered = config.parallel.exchange == "tower"
    modules, held, tower_ops = spec.towers.modules, spec.towers.towers, list[roofline.Op]()
    if modules is not None and held is not None:
        here = held.of_host(topology.host, hosts) if towered else range(len(held))
        tower_ops = roofline.tower_ops(spec, batch * hosts if towered else batch, here)
    averages = average_bytes(config, spec, topology, shards)
    copied = SPTT_COPY_BYTES[0 if "fp32" in config.parallel.messages else 1] * spec.layout.width * batch
    moved = {
        "glue": roofline.glue_bytes(config, spec.layout, batch) + towered * copied,
        "lookup": roofline.lookup_bytes(config, spec.layout, batch),
        "update": roofline.update_bytes(config, spec.layout, batch * world) // world,
        "skewed update": roofline.update_bytes(config, spec.layout, batch * world, skewed=True) // world,
        "optimizer": roofline.optimizer_bytes(config, sum(sizes), zero) + AVERAGED * averages,
    }
    if slowest:
        messages = slowest_messages(config, spec, first, shards)
        most = Load(*(max(own) for own in zip(*loads(config, spec, shards, world), strict=True)))
        moved |= {"lookup": round(most.lookup), "update": round(most.update), "skewed update": round(most.skewed)}
        moved["glue"] = round(moved["glue"] / 2 + most.glue)
    return Work(
        topology=topology,
        width=zero.width,
        accumulation=zero.accumulation,
        dense=roofline.dense_ops(config, spec, micro),
        towers=tower_ops,
        compression=None if modules is None else modules.compression,
        messages=messages,
        sent=dense_sent(sizes, zero),
        tensor=roofline.tensor_messages(spec, zero, topology, batch),
        dense_messages=dense_messages(config, spec, topology),
        stage=zero.stage,
        overlap=config.parallel.overlap,
        buckets=_buckets(sum(sizes), zero),
        labels=spec.labels > 1,
        early=zero.stage == 0 or bool(zero.settings.overlap_comm),
        reads=_reads(config, spec),
        moved=moved,
        launches=roofline.STEP_BYTES[zero.stage, zero.width < 4].launches * len(sizes),
        flop=spec.cost.flop * batch,
        tables=tuple(table_work(config, spec, shards, world, kinds)) if kinds else None,
    )


def _buckets(parameters: int, zero: Zero) -> int:
    return BUCKETS if zero.stage == 0 else max(1, -(-parameters // int(zero.settings.reduce_bucket_size)))


@remembered(lambda config, spec: (Same(spec.layout), config.embedding.weights, config.data.batch_size))
def _reads(config: RunConfig, spec: ModelSpec) -> tuple[Reads, ...]:
    element = 2 if config.embedding.weights == "fp16" else 4
    ids = dict.fromkeys((table.name for table in spec.layout.tables), 0.0)
    for feature in spec.layout.features:
        ids[feature.table] += mean_ids(feature, config.data.batch_size)
    return tuple(Reads(t.rows, t.columns * element, ids[t.name]) for t in spec.layout.tables)


def busiest(
    config: RunConfig, spec: ModelSpec, first: Topology, shards: Sequence[Shard]
) -> tuple[list[Message], Topology]:
    """The messages and the place of the rank that sends most to other hosts."""
    messages, rank = _busiest(config, spec, first, shards)
    return messages, dataclasses.replace(first, rank=rank)


def slowest_messages(config: RunConfig, spec: ModelSpec, first: Topology, shards: Sequence[Shard]) -> list[Message]:
    """Each message of the sparse side as the rank sends or receives it that sends or receives most of it.

    Of many ranks those are asked that hold most and fewest columns.
    """
    columns = [0] * first.world_size
    for shard in shards:
        columns[shard.rank] += shard.columns
    ranks = sorted(range(first.world_size), key=lambda rank: (-columns[rank], rank))
    asked = ranks if len(ranks) <= 2 * LOOKED_AT else [*ranks[:LOOKED_AT], *ranks[-LOOKED_AT:]]
    found = dict[tuple[str, str, str], Message]()
    for rank in asked:
        for message in sparse_messages(config, spec, dataclasses.replace(first, rank=rank), shards):
            key = message.group, message.op, message.direction
            size, across = (max(message.bytes, message.longest), max(message.cross_host_bytes, message.longest_across))
            known = found.get(key)
            if known is not None:
                size, across = max(size, known.bytes), max(across, known.cross_host_bytes)
            found[key] = message._replace(bytes=size, cross_host_bytes=across, mean=0, mean_across=0)
    return list(found.values())


@remembered(
    lambda config, spec, first, shards: (
        Same(spec),
        Same(shards),
        first.ranks_per_host,
        config.data.batch_size,
        str(config.parallel.messages),
        config.embedding.optimizer,
    )
)
def _busiest(config: RunConfig, spec: ModelSpec, first: Topology, shards: Sequence[Shard]) -> tuple[list[Message], int]:
    """Of the ranks that may be it, by the columns that they and their hosts look up."""
    lookups = Counter(feature.table for feature in spec.layout.features)
    columns, of_host = [0] * first.world_size, [0] * first.hosts
    for shard in shards:  # there are millions
        columns[shard.rank] += (shard.column_stop - shard.column_start) * lookups[shard.table]
    for rank, own in enumerate(columns):
        of_host[rank // first.ranks_per_host] += own
    total = sum(of_host)

    def sent(rank: int) -> int:
        """Flat: own columns to the ranks of other hosts, and gradients of the columns that those own; towers alike,
        by host."""
        host = rank // first.ranks_per_host
        if config.parallel.exchange == "tower":
            return of_host[host] * (first.hosts - 2) + total
        return columns[rank] * (first.world_size - first.ranks_per_host) + total - of_host[host]

    likely = sorted(range(first.world_size), key=lambda rank: (-sent(rank), rank))
    found: tuple[int, list[Message], int] | None = None
    for rank in dict.fromkeys((0, *likely[:2], likely[-1])):
        topology = dataclasses.replace(first, rank=rank)
        messages = sparse_messages(config, spec, topology, shards)
        across = sum(message.cross_host_bytes for message in messages)
        if found is None or across > found[0]:
            found = across, messages, rank
    assert found is not None
    return found[1], found[2]
