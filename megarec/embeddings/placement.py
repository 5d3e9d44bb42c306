"""Which rank holds which slice of which table.

A shard is a rectangle of a global table, so that checkpoints and reshaping are set arithmetic. The kinds placed here
are whole tables ("table") and column slices ("column"); row ranges and copies on several ranks can be expressed too.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megarec.embeddings.layout import EmbeddingLayout, Table
from megarec.errors import UserError

COLUMN_UNIT = 4  # FBGEMM wants widths in multiples of four


@dataclass(frozen=True, order=True)
class Shard:
    """Rows [row_start, row_stop) and columns [column_start, column_stop) of a global table, held by one rank."""

    table: str
    rank: int
    row_start: int
    row_stop: int
    column_start: int
    column_stop: int

    @property
    def rows(self) -> int:
        return self.row_stop - self.row_start

    @property
    def columns(self) -> int:
        return self.column_stop - self.column_start

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the shard in the global tensor."""
        return slice(self.row_start, self.row_stop), slice(self.column_start, self.column_stop)

    @property
    def per_row(self) -> "Shard":
        """The slice of a global [rows, 1] tensor, one number a row, that goes with this shard."""
        return dataclasses.replace(self, column_start=0, column_stop=1)

    @property
    def per_table(self) -> "Shard":
        """A global [1, 1] tensor, one number a table, that goes with this shard."""
        return Shard(self.table, self.rank, 0, 1, 0, 1)


def place(
    layout: EmbeddingLayout, kind: Literal["table", "column"], world_size: int, *, idle_ranks: bool = False
) -> tuple[Shard, ...]:
    """Shards of every table, the same on every rank, in table order and then column order.

    "table": whole tables, the most expensive first, each to the rank with the least cost so far. "column": every
    table split into columns over all ranks, in multiples of four and as even as those allow; a table with fewer
    multiples than ranks goes to the ranks with the least cost.

    Args:
        idle_ranks: whether a rank may hold nothing.

    Raises:
        UserError: a rank would hold nothing; the message has the arithmetic and a remedy.
    """
    shards = _whole_tables(layout, world_size) if kind == "table" else _column_slices(layout, world_size)
    if not idle_ranks and len({shard.rank for shard in shards}) < world_size:
        raise UserError(_idle_ranks(layout, kind, world_size))
    return shards


def place_on_hosts(
    hosts: Sequence[EmbeddingLayout], kind: Literal["table", "column"], ranks_per_host: int
) -> tuple[Shard, ...]:
    """`place` inside every host: hosts[h] is what host h holds; ranks are those of the whole job."""
    return tuple(
        dataclasses.replace(shard, rank=host * ranks_per_host + shard.rank)
        for host, layout in enumerate(hosts)
        for shard in place(layout, kind, ranks_per_host, idle_ranks=True)
    )


def table_costs(layout: EmbeddingLayout) -> dict[str, float]:
    """Cost of a table: its share of all bytes plus its share of all looked-up columns (one lookup a feature)."""
    size = {table.name: float(table.rows * table.columns) for table in layout.tables}
    traffic = dict.fromkeys(size, 0.0)
    for feature in layout.features:
        traffic[feature.table] += feature.columns
    return {name: size[name] / sum(size.values()) + traffic[name] / sum(traffic.values()) for name in size}


def _whole_tables(layout: EmbeddingLayout, world_size: int) -> tuple[Shard, ...]:
    costs = table_costs(layout)
    load = [0.0] * world_size
    owner: dict[str, int] = {}
    for table in sorted(layout.tables, key=lambda table: -costs[table.name]):
        rank = min(range(world_size), key=load.__getitem__)
        owner[table.name] = rank
        load[rank] += costs[table.name]
    return tuple(Shard(table.name, owner[table.name], 0, table.rows, 0, table.columns) for table in layout.tables)


def _column_slices(layout: EmbeddingLayout, world_size: int) -> tuple[Shard, ...]:
    costs = table_costs(layout)
    load = [0.0] * world_size
    shards: dict[str, list[Shard]] = {}
    for table in sorted(layout.tables, key=lambda table: -costs[table.name]):
        widths = _even_widths(table, world_size)
        ranks = sorted(range(world_size), key=load.__getitem__)[: len(widths)]
        start = 0
        shards[table.name] = []
        for rank, width in zip(ranks, widths, strict=True):  # wider slices come first: they go to the lighter ranks
            shards[table.name].append(Shard(table.name, rank, 0, table.rows, start, start + width))
            load[rank] += costs[table.name] * width / table.columns
            start += width
    return tuple(shard for table in layout.tables for shard in shards[table.name])


def _idle_ranks(layout: EmbeddingLayout, kind: str, world_size: int) -> str:
    if kind == "table":
        return (
            f'embedding.placement="table" cannot give {world_size} ranks a table each: {len(layout.tables)} tables '
            f'< {world_size} ranks; set embedding.placement="column" or use at most {len(layout.tables)} ranks'
        )
    pieces = sum(min(world_size, _units(table)) for table in layout.tables)
    listed = ", ".join(f"{table.name} {table.columns}" for table in layout.tables)
    return (
        f'embedding.placement="column" cannot give {world_size} ranks a slice each: the tables have {pieces} '
        f"slices of {COLUMN_UNIT} columns (columns: {listed}); widen model.dim or use at most {pieces} ranks"
    )


def _units(table: Table) -> int:
    return math.ceil(table.columns / COLUMN_UNIT)


def _even_widths(table: Table, world_size: int) -> Sequence[int]:
    """Widths in multiples of four, descending by at most four; the last takes what does not divide by four."""
    units = _units(table)
    parts = min(world_size, units)
    widths = [COLUMN_UNIT * (units // parts + (i < units % parts)) for i in range(parts)]
    widths[-1] -= COLUMN_UNIT * units - table.columns
    return widths
