"""What the sparse side of a rank sends in a step, message by message: the run's ledger, worked out beforehand.

Tests hold it to the ledger to the byte. What depends on the data is taken at its mean: the lengths of lists, ids spread
evenly over rows that ranks share, and the rows that a batch touches in a table whose columns several ranks share (the
sums of squares of row-wise Adagrad).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megarec.config.sections import RunConfig
from megarec.distributed.collectives import MESSAGE_TYPES, Direction, WireDtypes
from megarec.distributed.topology import Topology, group_ranks
from megarec.run.spec import ModelSpec
from megarec.sparse.layout import EmbeddingLayout, Feature
from megarec.sparse.lookups import Lookup, plan_lookups
from megarec.sparse.placement import Shard, replicated
from megarec.sparse.run_placement import layouts_by_host, on_host, place_run

IDS_OF_A_LIST = 2.5  # on average, as in synthetic data; where the data say their own, that


def mean_ids(feature: Feature, examples: int) -> float:
    """Ids of some examples, lists at their mean length."""
    if not feature.multi_valued:
        return examples
    mean = IDS_OF_A_LIST if feature.mean_length == 1 else feature.mean_length
    return examples * min(mean, feature.positions or mean)


def touched_rows(rows: int, ids: float) -> float:
    """Rows that some ids, spread evenly, touch at least once."""
    return -rows * math.expm1(-ids / rows)


class Message(NamedTuple):
    """One collective of a step.

    Attributes:
        group, op, dtype, direction: as in the ledger.
        bytes: that the rank sends to others of the group, `cross_host_bytes` of them to other hosts.
        pairs: ranks of other hosts that it sends to.
    """

    group: str
    op: str
    dtype: str
    direction: Direction
    bytes: int
    cross_host_bytes: int
    pairs: int


class _Group(NamedTuple):
    """A group of ranks, the place of this one, and which of them are on other hosts."""

    name: str
    rank: int
    size: int
    remote: tuple[bool, ...]


def sparse_messages(
    config: RunConfig, spec: ModelSpec, topology: Topology, shards: Sequence[Shard] | None = None
) -> list[Message]:
    """The messages of a training step in the order of their parts, none that is empty.

    Args:
        topology: the job and the rank; its groups are not looked at.
        shards: where all tables lie; None: as the config places them.

    Raises:
        UserError: ranks, towers and tables do not fit together.
    """
    exchange, examples = config.parallel.exchange, config.data.batch_size // topology.world_size
    parts = layouts_by_host(spec.layout, topology, exchange, spec.towers)
    shards = place_run(config, spec.layout, spec.towers, topology) if shards is None else shards
    world, tower, peer = (_group(topology, name) for name in ("world", "tower", "peer"))
    modules, held = spec.towers.modules, spec.towers.towers
    if exchange == "flat":
        found = _group_messages(config, parts[0], shards, world, examples)
        if modules is not None and held is not None:
            found.append(_tower_gradients(spec, range(len(held)), world))
        return [message for message in found if message.bytes]
    small = all(table.rows < 2**31 for part in parts for table in part.tables)
    dtype = torch.int32 if small else torch.int64
    features = [part.looked_up for part in parts]
    counts = [[mean_ids(feature, examples) for feature in own] for own in features]
    found = _ids(counts, features, peer, dtype, examples)
    own = on_host(shards, topology)
    found += _group_messages(config, parts[topology.host], own, tower, examples * topology.hosts)
    outputs = [part.width for part in parts]
    if modules is not None and held is not None:
        here = [held.of_host(host, topology.hosts) for host in range(topology.hosts)]
        outputs = [modules.output_columns(towers) for towers in here]
    wire = _wire(config)
    found.append(_all_to_all("towers", [examples * outputs[topology.host]] * peer.size, wire.forward, peer))
    back = [examples * columns for columns in outputs]
    found.append(_all_to_all("towers", back, wire.backward, peer, "backward"))
    asked = [sum(f.columns * mean_ids(f, examples) for f in part.unpooled) for part in parts]
    found += _rows([asked[topology.host]] * peer.size, asked, peer, wire)
    if modules is not None and held is not None:
        found.append(_tower_gradients(spec, held.of_host(topology.host, topology.hosts), tower))
    return [message for message in found if message.bytes]


def _group(topology: Topology, name: str) -> _Group:
    every = {"world": [list(range(topology.world_size))]}
    kinds = group_ranks(topology.world_size, topology.ranks_per_host, topology.tensor_size) | every
    members = next(ranks for ranks in kinds[name] if topology.rank in ranks)
    remote = tuple(rank // topology.ranks_per_host != topology.host for rank in members)
    return _Group(name, members.index(topology.rank), len(members), remote)


def _wire(config: RunConfig) -> WireDtypes:
    forward, backward = (MESSAGE_TYPES[name] for name in config.parallel.messages)
    return WireDtypes(forward, backward)


def _group_messages(
    config: RunConfig, layout: EmbeddingLayout, shards: Sequence[Shard], group: _Group, examples: int
) -> list[Message]:
    """exchange/group.py: ids, embeddings and gradients among the ranks that hold a layout's tables."""
    names = replicated(shards)
    spread = [shard for shard in shards if shard.table not in names]
    wire, found = _wire(config), list[Message]()
    if spread:
        plan = plan_lookups(layout, spread, group.size)
        rows = {table.name: table.rows for table in layout.tables}
        every = [(*own, *unpooled) for own, unpooled in zip(plan.slots, plan.unpooled, strict=True)]
        counts = [[mean_ids(s.feature, examples) * _row_share(s, rows) for s in slots] for slots in every]
        found += _ids(counts, plan.sources, group, plan.index_dtype, examples)
        asked = [sum(s.columns * mean_ids(s.feature, examples) * _row_share(s, rows) for s in u) for u in plan.unpooled]
        found += _rows([asked[group.rank]] * group.size, asked, group, wire)
        columns = [sum(slot.columns for slot in slots if not slot.by_rows) for slots in plan.slots]
        split = sum(slot.columns for slot in plan.slots[group.rank] if slot.by_rows)
        own = columns[group.rank]
        found.append(_all_to_all("embeddings", [examples * own] * group.size, wire.forward, group))
        back = [examples * width for width in columns]
        found.append(_all_to_all("embeddings", back, wire.backward, group, "backward"))
        summed = "reduce_scatter" if wire.forward == torch.float32 else "all_to_all"
        found.append(_to_all(f"{summed} embeddings", examples * split, wire.forward, group))
        found.append(_to_all("all_gather embeddings", examples * split, wire.backward, group, "backward"))
        found.append(_squares(config, layout, spread, group, examples))
    if config.embedding.gradient_clipping is not None:
        found.append(_all_reduce("table norm", 1, group))
    copied = {shard.table: shard for shard in shards if shard.table in names}
    found.append(_all_reduce("gradients", sum(s.rows * (s.columns + 1) for s in copied.values()), group))
    return found


def _rows(sent: Sequence[float], back: Sequence[float], group: _Group, wire: WireDtypes) -> list[Message]:
    """exchange/unpooled.py: the rows of sequences, and their gradients; numbers for each rank."""
    return [
        _all_to_all("sequences", sent, wire.forward, group),
        _all_to_all("sequences", back, wire.backward, group, "backward"),
    ]


def _row_share(slot: Lookup, rows: dict[str, int]) -> float:
    return slot.shard.rows / rows[slot.shard.table] if slot.by_rows else 1.0


def _squares(
    config: RunConfig, layout: EmbeddingLayout, shards: Sequence[Shard], group: _Group, examples: int
) -> Message:
    """torch_backend.py, ColumnShardSum: a number for each updated row to every rank with other columns of it."""
    sizes = [0.0] * group.size
    if config.embedding.optimizer == "rowwise_adagrad":
        for mine in (shard for shard in shards if shard.rank == group.rank):
            ids = sum(mean_ids(f, examples) for f in layout.looked_up if f.table == mine.table) * group.size
            for other in shards:
                if (other.table, other.row_start) == (mine.table, mine.row_start) and other.rank != mine.rank:
                    all_rows = config.embedding.rule_of(mine.table).all_rows
                    sizes[other.rank] += mine.rows if all_rows else touched_rows(mine.rows, ids)
    return _all_to_all("squares", sizes, torch.float32, group, "backward")


def _ids(
    counts: Sequence[Sequence[float]],
    features: Sequence[Sequence[Feature]],
    group: _Group,
    dtype: torch.dtype,
    examples: int,
) -> list[Message]:
    """exchange/ids.py: lengths of lists, ids, weights; `counts` are ids by rank and slot."""
    lists = [examples * sum(feature.multi_valued for feature in own) for own in features]
    found = [_all_to_all("lengths", lists, dtype, group)] if any(lists) else []
    found.append(_all_to_all("ids", [sum(own) for own in counts], dtype, group))
    weighted = [
        sum(count for count, feature in zip(of_rank, own, strict=True) if feature.weighted)
        for of_rank, own in zip(counts, features, strict=True)
    ]
    return [*found, _all_to_all("weights", weighted, torch.float32, group)]


def _all_to_all(
    what: str, sizes: Sequence[float], dtype: torch.dtype, group: _Group, direction: Direction = "forward"
) -> Message:
    """`sizes`: elements for each rank."""
    width = dtype.itemsize
    sent = round(width * (sum(sizes) - sizes[group.rank]))
    across = round(width * sum(size for size, remote in zip(sizes, group.remote, strict=True) if remote))
    return _message(f"all_to_all {what}", sent, across, dtype, group, direction)


def _to_all(op: str, elements: int, dtype: torch.dtype, group: _Group, direction: Direction = "forward") -> Message:
    """As many elements to each rank."""
    size = elements * dtype.itemsize
    return _message(op, (group.size - 1) * size, sum(group.remote) * size, dtype, group, direction)


def _all_reduce(what: str, elements: int, group: _Group) -> Message:
    """In float32, as a ring: reduce-scatter, then all-gather."""
    kept = 4 * elements // group.size
    sent, across = 2 * (group.size - 1) * kept, 2 * sum(group.remote) * kept
    return _message(f"all_reduce {what}", sent, across, torch.float32, group, "backward")


def _tower_gradients(spec: ModelSpec, towers: Sequence[int], group: _Group) -> Message:
    own = spec.cost.layers["towers"]
    return _all_reduce("tower gradients", sum(own[f"towers.{t}"].parameters for t in towers), group)


def _message(op: str, sent: int, across: int, dtype: torch.dtype, group: _Group, direction: Direction) -> Message:
    name = str(dtype).removeprefix("torch.")
    return Message(group.name, op, name, direction, sent, across, sum(group.remote))
