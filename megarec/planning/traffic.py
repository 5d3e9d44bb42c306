"""What the sparse side of a rank sends in a step, message by message: the run's ledger, worked out beforehand.

Tests hold it to the ledger to the byte. What depends on the data is taken at its mean: the lengths of lists, ids spread
evenly over rows that ranks share, and the rows that a batch touches in a table whose columns several ranks share (the
sums of squares of row-wise Adagrad).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megarec.config.sections import RunConfig
from megarec.distributed.collectives import MESSAGE_TYPES, Direction, WireDtypes
from megarec.distributed.topology import Topology, group_ranks
from megarec.planning.memo import Same, remembered
from megarec.run.spec import ModelSpec
from megarec.sparse.layout import EmbeddingLayout, Feature
from megarec.sparse.placement import Shard, replicated, split_by_rows
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
        longest, longest_across: as bytes and cross_host_bytes, of the rank that receives most where ranks differ in
            what they receive.
        mean, mean_across: of the ranks of a job whose hosts have alike many, on average.
    """

    group: str
    op: str
    dtype: str
    direction: Direction
    bytes: int
    cross_host_bytes: int
    pairs: int
    longest: int = 0
    longest_across: int = 0
    mean: int = 0
    mean_across: int = 0


class _Group(NamedTuple):
    """A group of ranks, the place of this one, and which of them are on other hosts."""

    name: str
    rank: int
    size: int
    remote: tuple[bool, ...]


class _Loads(NamedTuple):
    """By rank of a group, of what others send it: ids, lists and weights of so many examples; columns of its tables,
    and of its parts of tables that are split by rows; numbers of the rows of sequences."""

    ids: list[float]
    lists: list[int]
    weights: list[float]
    columns: list[int]
    split: list[int]
    rows: list[float]


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
    found = _ids(_by_host(parts, examples), peer, _index_dtype(parts))
    own = on_host(shards, topology)
    found += _group_messages(config, parts[topology.host], own, tower, examples * topology.hosts)
    outputs = [part.width for part in parts]
    if modules is not None and held is not None:
        here = [held.of_host(host, topology.hosts) for host in range(topology.hosts)]
        outputs = [modules.output_columns(towers) for towers in here]
    wire, back = _wire(config), [examples * columns for columns in outputs]
    found.append(
        _all_to_all("towers", [examples * outputs[topology.host]] * peer.size, wire.forward, peer, total=sum(back))
    )
    found.append(_all_to_all("towers", back, wire.backward, peer, "backward"))
    asked = [sum(f.columns * mean_ids(f, examples) for f in part.unpooled) for part in parts]
    found += _rows([asked[topology.host]] * peer.size, asked, peer, wire)
    if modules is not None and held is not None:
        found.append(_tower_gradients(spec, held.of_host(topology.host, topology.hosts), tower))
    return [message for message in found if message.bytes]


@remembered(
    lambda config, spec, topology: (
        Same(spec.layout),
        Same(spec.towers),
        config.parallel.exchange,
        config.embedding.placement,
        str(config.embedding.table_placements),
        config.data.batch_size,
        topology.world_size,
        topology.ranks_per_host,
    ),
    kept=8,
)
def placed(config: RunConfig, spec: ModelSpec, topology: Topology) -> tuple[Shard, ...]:
    """Where all tables of a job lie. Of replicated tables the copies of ranks 0 and 1 alone under the flat exchange:
    thousands of ranks have millions of them. `seen_by` has a rank's own."""
    return place_run(config, spec.layout, spec.towers, topology, copies=range(min(2, topology.world_size)))


@remembered(lambda shards, config, topology: (Same(shards), config.parallel.exchange, topology.rank), kept=8)
def seen_by(shards: Sequence[Shard], config: RunConfig, topology: Topology) -> Sequence[Shard]:
    """`placed`, with the copies that the rank of a topology holds."""
    if config.parallel.exchange == "tower" or topology.rank < 2:
        return shards
    names = copied(shards)
    if any(s.rank == topology.rank and s.table in names for s in shards):
        return shards  # all copies are listed
    copies = [dataclasses.replace(s, rank=topology.rank) for s in shards if s.table in names and s.rank == 0]
    return [*shards, *copies]


@remembered(lambda shards: (Same(shards),), kept=8)
def copied(shards: Sequence[Shard]) -> set[str]:
    """The tables of which several ranks hold a copy, of millions of shards but once."""
    return replicated(shards)


def _by_host(parts: Sequence[EmbeddingLayout], examples: int) -> _Loads:
    """What peers send each other: the ids of the features that each host looks up."""
    return _Loads(
        [sum(mean_ids(feature, examples) for feature in part.looked_up) for part in parts],
        [examples * sum(feature.multi_valued for feature in part.looked_up) for part in parts],
        [sum(mean_ids(feature, examples) for feature in part.looked_up if feature.weighted) for part in parts],
        columns=[],
        split=[],
        rows=[],
    )


def _group(topology: Topology, name: str) -> _Group:
    every = {"world": [list(range(topology.world_size))]}
    kinds = group_ranks(topology.world_size, topology.ranks_per_host, topology.tensor_size) | every
    members = next(ranks for ranks in kinds[name] if topology.rank in ranks)
    remote = tuple(rank // topology.ranks_per_host != topology.host for rank in members)
    return _Group(name, members.index(topology.rank), len(members), remote)


def _wire(config: RunConfig) -> WireDtypes:
    forward, backward = (MESSAGE_TYPES[name] for name in config.parallel.messages)
    return WireDtypes(forward, backward)


@remembered(lambda layout, shards, ranks, examples: (Same(layout), Same(shards), ranks, examples), kept=8)
def rank_loads(layout: EmbeddingLayout, shards: Sequence[Shard], ranks: int, examples: int) -> _Loads:
    """sparse/lookups.py, slot by slot: a feature looked up in a shard of a table that has no copies. Of tables split by
    rows every rank gets the ids of its rows, as lists."""
    names = copied(shards)
    found = _Loads([0.0] * ranks, [0] * ranks, [0.0] * ranks, [0] * ranks, [0] * ranks, [0.0] * ranks)
    by_rows, rows = split_by_rows(shards), {table.name: table.rows for table in layout.tables}
    of_table: dict[str, list[Feature]] = {}
    pooled, sequences = (dict.fromkeys(rows, 0.0) for _ in range(2))
    for feature in layout.features:
        pooled[feature.table] += 1
    for feature in layout.unpooled:
        sequences[feature.table] += mean_ids(feature, examples)
    for feature in layout.looked_up:
        of_table.setdefault(feature.table, []).append(feature)
    looked_up = {
        name: (
            len(own),
            sum(feature.multi_valued for feature in own),
            sum(mean_ids(feature, examples) for feature in own),
            sum(mean_ids(feature, examples) for feature in own if feature.weighted),
        )
        for name, own in of_table.items()
    }
    for shard in shards:  # there are millions
        table, rank, columns = shard.table, shard.rank, shard.column_stop - shard.column_start
        if table in names:
            continue
        features, lists, ids, weights = looked_up[table]
        split = table in by_rows
        share = (shard.row_stop - shard.row_start) / rows[table] if split else 1.0
        found.ids[rank] += share * ids
        found.lists[rank] += examples * (features if split else lists)
        found.weights[rank] += share * weights
        (found.split if split else found.columns)[rank] += int(pooled[table]) * columns
        found.rows[rank] += share * sequences[table] * columns
    return found


def _group_messages(
    config: RunConfig, layout: EmbeddingLayout, shards: Sequence[Shard], group: _Group, examples: int
) -> list[Message]:
    """exchange/group.py: ids, embeddings and gradients among the ranks that hold a layout's tables."""
    names = copied(shards)
    spread = [shard for shard in shards if shard.table not in names] if names else shards
    wire, found = _wire(config), list[Message]()
    if spread:
        loads = rank_loads(layout, shards, group.size, examples)
        own, split = loads.columns[group.rank], loads.split[group.rank]
        found += _ids(loads, group, _index_dtype([layout]))
        found += _rows([loads.rows[group.rank]] * group.size, loads.rows, group, wire)
        found.append(
            _all_to_all(
                "embeddings", [examples * own] * group.size, wire.forward, group, total=examples * sum(loads.columns)
            )
        )
        back = [examples * width for width in loads.columns]
        found.append(_all_to_all("embeddings", back, wire.backward, group, "backward"))
        summed = "reduce_scatter" if wire.forward == torch.float32 else "all_to_all"
        found.append(_to_all(f"{summed} embeddings", examples * split, wire.forward, group))
        found.append(_to_all("all_gather embeddings", examples * split, wire.backward, group, "backward"))
        found.append(_squares(config, layout, spread, group, examples))
    if config.embedding.gradient_clipping is not None:
        found.append(_all_reduce("table norm", 1, group))
    copies = {shard.table: shard for shard in shards if shard.table in names} if names else {}
    found.append(_all_reduce("gradients", sum(s.rows * (s.columns + 1) for s in copies.values()), group))
    return found


def _index_dtype(parts: Sequence[EmbeddingLayout]) -> torch.dtype:
    return torch.int32 if all(table.rows < 2**31 for part in parts for table in part.tables) else torch.int64


def _rows(sent: Sequence[float], back: Sequence[float], group: _Group, wire: WireDtypes) -> list[Message]:
    """exchange/unpooled.py: the rows of sequences, and their gradients; numbers for each rank."""
    return [
        _all_to_all("sequences", sent, wire.forward, group, total=sum(back)),
        _all_to_all("sequences", back, wire.backward, group, "backward"),
    ]


def _squares(
    config: RunConfig, layout: EmbeddingLayout, shards: Sequence[Shard], group: _Group, examples: int
) -> Message:
    """torch_backend.py, ColumnShardSum: a number for each updated row to every rank with other columns of it."""
    sizes = [0.0] * group.size
    if config.embedding.optimizer == "rowwise_adagrad":
        of_table = dict.fromkeys((table.name for table in layout.tables), 0.0)
        for feature in layout.looked_up:
            of_table[feature.table] += mean_ids(feature, examples)
        widths = {table.name: table.columns for table in layout.tables}
        here = {(s.table, s.row_start): s for s in shards if s.rank == group.rank}
        tables = {s.table for s in here.values() if s.columns < widths[s.table]}  # others share their columns
        for other in shards:
            if other.table not in tables:
                continue
            mine = here.get((other.table, other.row_start))
            if mine is not None and other.rank != mine.rank:
                all_rows = config.embedding.rule_of(mine.table).all_rows
                touched = touched_rows(mine.rows, of_table[mine.table] * group.size)
                sizes[other.rank] += mine.rows if all_rows else touched
    return _all_to_all("squares", sizes, torch.float32, group, "backward")


def _ids(loads: _Loads, group: _Group, dtype: torch.dtype) -> list[Message]:
    """exchange/ids.py: lengths of lists, ids, weights."""
    found = [_all_to_all("lengths", loads.lists, dtype, group)] if any(loads.lists) else []
    found.append(_all_to_all("ids", loads.ids, dtype, group))
    return [*found, _all_to_all("weights", loads.weights, torch.float32, group)]


def _all_to_all(
    what: str,
    sizes: Sequence[float],
    dtype: torch.dtype,
    group: _Group,
    direction: Direction = "forward",
    total: float | None = None,
) -> Message:
    """`sizes`: elements for each rank; `total`: what a rank has for all, itself too, on average; None: as this one."""
    width = dtype.itemsize
    sent = round(width * (sum(sizes) - sizes[group.rank]))
    across = round(width * sum(size for size, remote in zip(sizes, group.remote, strict=True) if remote))
    most, far = max(sizes, default=0.0) * width, sum(group.remote)
    message = _message(f"all_to_all {what}", sent, across, dtype, group, direction)
    mean = width * (sum(sizes) if total is None else total) / group.size
    return message._replace(
        longest=round(most * (group.size - 1)), longest_across=round(most * far),
        mean=round(mean * (group.size - 1)), mean_across=round(mean * far),
    )  # fmt: skip


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
