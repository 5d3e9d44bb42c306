"""Where the tables of a run lie, why, and how evenly; from the config and the schema alone."""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from megarec.config.sections import EmbeddingConfig, RunConfig
from megarec.distributed.topology import Topology
from megarec.sparse.exchange.tower_exchange import host_layouts
from megarec.sparse.layout import EmbeddingLayout, Table
from megarec.sparse.placement import Kind, Shard, check_table_names, choose_plans, place, place_on_hosts, replicated
from megarec.sparse.tables.optimizers import table_bytes
from megarec.sparse.towers.assignment import check_towers
from megarec.sparse.towers.sizes import ResolvedTowers


def layouts_by_host(
    layout: EmbeddingLayout, topology: Topology, exchange: Literal["flat", "tower"], towers: ResolvedTowers
) -> list[EmbeddingLayout]:
    """What every host looks up, tower after tower; one entry for all of them under the flat exchange.

    Raises:
        UserError: the hosts cannot share the towers equally.
    """
    if exchange == "flat" and towers.modules is None:
        return [layout]
    assert towers.towers is not None, "config/load.py refuses the tower exchange without towers"
    hosts = topology.hosts if exchange == "tower" else 1
    check_towers(towers.towers, hosts)
    return host_layouts(layout, towers.towers.features, hosts)


def place_shards(
    parts: Sequence[EmbeddingLayout],
    config: EmbeddingConfig,
    topology: Topology,
    exchange: Literal["flat", "tower"],
    examples: int | None = None,
    copies: Collection[int] | None = None,
) -> tuple[Shard, ...]:
    """Where all tables lie, given `layouts_by_host`; ranks are those of the whole job.

    Args:
        examples: of a rank in a step, by which "auto" replicates tables; None: it replicates none.
        copies: under the flat exchange, the ranks whose copies of replicated tables are listed; None: all.
    """
    check_table_names(parts, config.tables)
    tables = config.table_placements
    if exchange == "flat":
        return place(parts[0], config.placement, topology.world_size, tables=tables, examples=examples, copies=copies)
    of_peers = None if examples is None else examples * topology.hosts
    return place_on_hosts(parts, config.placement, topology.ranks_per_host, tables=tables, examples=of_peers)


def place_run(
    config: RunConfig,
    layout: EmbeddingLayout,
    towers: ResolvedTowers,
    topology: Topology,
    copies: Collection[int] | None = None,
) -> tuple[Shard, ...]:
    """Where all tables of a run lie; the topology's groups are not looked at.

    Args:
        copies: see `place_shards`.
    """
    exchange, examples = config.parallel.exchange, config.data.batch_size // topology.world_size
    parts = layouts_by_host(layout, topology, exchange, towers)
    return place_shards(parts, config.embedding, topology, exchange, examples, copies)


def on_host(shards: Sequence[Shard], topology: Topology) -> tuple[Shard, ...]:
    """The shards of this rank's host, by local rank."""
    first = topology.host * topology.ranks_per_host
    own = (shard for shard in shards if first <= shard.rank < first + topology.ranks_per_host)
    return tuple(dataclasses.replace(shard, rank=shard.rank - first) for shard in own)


def at_most_ten(entries: list[str]) -> list[str]:
    """At most ten: hundreds of tables or ranks would drown the log."""
    return entries if len(entries) <= 10 else [*entries[:8], f"... ({len(entries) - 9} more)", entries[-1]]


@dataclass(frozen=True)
class TablePlacement:
    """One table.

    Attributes:
        host: that holds it; None: all of them.
        ranks: of the whole job, in the order of their slices.
        bytes: of its weights on all ranks together.
        state_bytes: of what its optimizer and its regularisation keep beside them.
    """

    table: str
    rows: int
    columns: int
    kind: Kind
    why: str
    host: int | None
    ranks: tuple[int, ...]
    bytes: int
    state_bytes: int


@dataclass(frozen=True)
class RankLoad:
    """What one rank has.

    Attributes:
        bytes: of weights; `state_bytes`: as of a table.
        lookups: rows it reads in a step, lists taken at their mean length where the data say it, else at 1.
    """

    rank: int
    shards: int
    bytes: int
    state_bytes: int
    lookups: float


@dataclass(frozen=True)
class Explanation:
    tables: tuple[TablePlacement, ...]
    ranks: tuple[RankLoad, ...]

    @property
    def imbalance(self) -> dict[str, float]:
        """The largest ratio of a rank to the mean: of bytes and of lookups."""
        loads = {"bytes": [float(r.bytes) for r in self.ranks], "lookups": [r.lookups for r in self.ranks]}
        # Where nothing is held or read, as with one list that is always empty, all ranks are equal.
        return {name: max(rank) * len(rank) / sum(rank) if sum(rank) else 1.0 for name, rank in loads.items()}

    def lines(self) -> list[str]:
        """For the log: the imbalance, and the tables that are not whole."""
        counts = {kind: sum(t.kind == kind for t in self.tables) for kind in ("table", "column", "row", "replicated")}
        words = {"table": "whole", "column": "by columns", "row": "by rows", "replicated": "replicated"}
        held = ", ".join(f"{count} {words[kind]}" for kind, count in counts.items() if count)
        uneven = ", ".join(f"{name} {value:.2f}" for name, value in self.imbalance.items())
        split = [
            f"placement: {t.table} {words[t.kind]} on {len(t.ranks)} ranks ({t.why})"
            for t in self.tables
            if t.kind != "table"
        ]
        return [f"placement: {held}; largest rank over the mean: {uneven}", *at_most_ten(split)]


def explain(config: RunConfig, layout: EmbeddingLayout, towers: ResolvedTowers, topology: Topology) -> Explanation:
    """The placement of a run; the topology's groups are not looked at.

    Raises:
        UserError: tables, towers and ranks do not fit together.
    """
    exchange, settings = config.parallel.exchange, config.embedding
    parts = layouts_by_host(layout, topology, exchange, towers)
    flat = exchange == "flat"
    group = topology.world_size if flat else topology.ranks_per_host
    shards = place_run(config, layout, towers, topology)
    examples = config.data.batch_size // topology.world_size * (1 if flat else topology.hosts)
    tables = []
    for host, part in enumerate(parts):
        plans = choose_plans(part, settings.placement, group, settings.table_placements, examples)
        for table in part.tables:
            plan, own = plans[table.name], [shard for shard in shards if shard.table == table.name]
            tables.append(
                TablePlacement(
                    table=table.name,
                    rows=table.rows,
                    columns=table.columns,
                    kind=plan.kind,
                    why=plan.why,
                    host=None if flat else host,
                    ranks=tuple(shard.rank for shard in own),
                    bytes=_bytes(own, config),
                    state_bytes=table_bytes(own, settings) - _bytes(own, config),
                )
            )
    loads = []
    names = replicated(shards)
    by_name = {table.name: table for table in layout.tables}
    per_example = _lookups(layout)
    for rank in range(topology.world_size):
        own = [shard for shard in shards if shard.rank == rank]
        share = {s: 1 / group if s.table in names else _share_of_rows(s, by_name[s.table]) for s in own}
        lookups = config.data.batch_size * sum(per_example[s.table] * share[s] for s in own)
        size = _bytes(own, config)
        loads.append(RankLoad(rank, len(own), size, table_bytes(own, settings) - size, lookups))
    return Explanation(tuple(tables), tuple(loads))


def _bytes(shards: Sequence[Shard], config: RunConfig) -> int:
    return sum(s.rows * s.columns for s in shards) * (2 if config.embedding.weights == "fp16" else 4)


def _lookups(layout: EmbeddingLayout) -> dict[str, float]:
    """Rows of a table that an example looks up."""
    lookups = dict.fromkeys((table.name for table in layout.tables), 0.0)
    for feature in layout.looked_up:
        lookups[feature.table] += feature.mean_length
    return lookups


def _share_of_rows(shard: Shard, table: Table) -> float:
    return shard.rows / table.rows
