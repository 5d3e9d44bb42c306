"""Which rank holds which slice of which table.

A shard is a rectangle of a global table, so that checkpoints and reshaping are set arithmetic. A `TablePlan` says how
a table is cut, and why; then the pieces are given to ranks.

table       whole, on one rank
column      columns split over some ranks, in multiples of four
row         rows split over all ranks: an example's embedding is the sum of what every rank found
replicated  a copy on every rank: nothing is sent but the gradients of its rows
"""

import dataclasses
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megarec.config.sections import Placement
from megarec.errors import UserError, did_you_mean
from megarec.sparse.layout import EmbeddingLayout, Feature, Table

Kind = Literal["table", "column", "row", "replicated"]
Requested = Placement

COLUMN_UNIT = 4  # FBGEMM wants widths in multiples of four
WIDE = 16  # columns of a slice: a cache line of float32
LARGE = 1.5  # of a rank's fair share of the cost
FEW = 8  # ranks, as of one host: few enough that each can send whole embeddings of a row-wise table
REPLICATED_CELLS = 2**18  # at most 1 MiB in float32
EVEN = 1.25  # 26 equal tables on 8 ranks stay whole: 4 over 3.25


@dataclass(frozen=True)
class TablePlan:
    """One table's kind.

    Attributes:
        parts: number of ranks that hold the table.
        why: for people.
    """

    kind: Kind
    parts: int
    why: str


def plan_tables(
    layout: EmbeddingLayout,
    requested: Requested,
    ranks: int,
    tables: Mapping[str, Requested],
    examples: int | None,
    split_threshold: int = 1,
) -> dict[str, TablePlan]:
    """The plan of every table, in table order; the same on every rank.

    Args:
        requested: for the tables that `tables` does not name.
        ranks: of the group that holds these tables.
        examples: of one rank of the group in a step, by which "auto" replicates tables; None: it replicates none.
        split_threshold: "auto" leaves a table whole up to 1 / split_threshold of a rank's fair share of the cost of all
            tables that are not replicated.
    """
    by_table: dict[str, Requested] = {table.name: tables.get(table.name, requested) for table in layout.tables}
    chosen = {
        t.name
        for t in layout.tables
        if by_table[t.name] == "auto" and ranks > 1 and _replication_pays(layout, t, examples)
    }
    whole_everywhere = chosen | {name for name, own in by_table.items() if own == "replicated"}
    costs = table_costs(layout)
    share = sum(cost for name, cost in costs.items() if name not in whole_everywhere) / ranks
    plans = {}
    for table in layout.tables:
        own, why = by_table[table.name], f'embedding.placement="{requested}"'
        if table.name in tables:
            why = f'embedding.tables.{table.name}.placement="{own}"'
        if ranks == 1:
            plans[table.name] = TablePlan("table", 1, "one rank")
        elif own != "auto":
            plans[table.name] = _as_requested(table, own, ranks, why)
        elif table.name in chosen:
            rows = (examples or 0) * _features(layout, table)
            plans[table.name] = TablePlan("replicated", ranks, f"{table.rows:,} rows, {rows:,.0f} looked up by a rank")
        else:
            plans[table.name] = _automatic(table, costs[table.name] / share, split_threshold, ranks)
    return plans


def table_costs(layout: EmbeddingLayout) -> dict[str, float]:
    """Cost of a table: its share of all bytes, plus that of all columns read (list length x columns a feature), plus
    that of all columns sent (columns a feature)."""
    size = {table.name: float(table.rows * table.columns) for table in layout.tables}
    read, sent = dict.fromkeys(size, 0.0), dict.fromkeys(size, 0.0)
    for feature in layout.looked_up:
        read[feature.table] += feature.columns * feature.mean_length
        sent[feature.table] += feature.columns * _sent_rows(layout, feature)
    totals = [sum(share.values()) or 1.0 for share in (size, read, sent)]  # lists may all be always empty
    return {n: size[n] / totals[0] + read[n] / totals[1] + sent[n] / totals[2] for n in size}


def _sent_rows(layout: EmbeddingLayout, feature: Feature) -> float:
    """Rows that an example's feature sends on: one, however many are pooled; of a sequence every one."""
    return feature.mean_length if feature in layout.unpooled else 1.0


def check_table_names(parts: Sequence[EmbeddingLayout], tables: Collection[str]) -> None:
    """Raise a UserError for a table in `embedding.tables` that none of the layouts has."""
    known = [table.name for layout in parts for table in layout.tables]
    for name in tables:
        if name not in known:
            raise UserError(f"embedding.tables.{name}: the model has no such table; {did_you_mean(name, known)}")


def column_units(table: Table) -> int:
    return math.ceil(table.columns / COLUMN_UNIT)


def _replication_pays(layout: EmbeddingLayout, table: Table, examples: int | None) -> bool:
    """Whether a copy on every rank at most halves what the table sends.

    In a group of G a copy sends 2 (G-1)/G rows x columns for the gradients (an all-reduce); on one rank the table sends
    2 (G-1)/G examples x features x columns for embeddings and their gradients, and the ids.
    """
    if examples is None or table.rows * table.columns > REPLICATED_CELLS:
        return False
    return 2 * table.rows <= examples * _features(layout, table)


def _features(layout: EmbeddingLayout, table: Table) -> float:
    """Rows that travel to an example: one a pooled feature, those of a sequence at its mean length."""
    pooled = sum(feature.table == table.name for feature in layout.features)
    return pooled + sum(feature.mean_length for feature in layout.unpooled if feature.table == table.name)


def _as_requested(table: Table, requested: Kind, ranks: int, why: str) -> TablePlan:
    if requested == "replicated":
        return TablePlan("replicated", ranks, why)
    if requested == "row" and table.rows < ranks:
        return TablePlan("table", 1, f"{why}, but {table.rows} rows < {ranks} ranks")
    if requested == "row":
        return TablePlan("row", ranks, why)
    parts = min(ranks, column_units(table)) if requested == "column" else 1
    return TablePlan("table" if parts == 1 else "column", parts, why)


def _automatic(table: Table, shares: float, split_threshold: int, ranks: int) -> TablePlan:
    """Whole where it fits; else in columns, which send no more than a whole table; rows, where every rank sends as
    much as a whole table, only where the widest useful split leaves slices of more than `LARGE` fair shares. Of more
    than `FEW` ranks the narrowest split comes before rows.

    Args:
        shares: cost of the table in fair shares of a rank.
    """
    parts = min(ranks, math.ceil(shares * split_threshold - 1e-9))
    narrow = ranks > FEW and shares / max(1, table.columns // WIDE) > LARGE
    width = COLUMN_UNIT if narrow else WIDE
    slices = min(parts, max(1, table.columns // width))
    why = f"{shares:.2f} of a fair share"
    if shares / slices > LARGE and table.rows >= ranks:
        return TablePlan("row", ranks, f"{why}, {shares / slices:.2f} in slices of {width} columns")
    if slices > 1:
        return TablePlan("column", slices, f"{why}, slices of at least {width} columns")
    return TablePlan("table", 1, why)


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
    layout: EmbeddingLayout,
    kind: Requested,
    world_size: int,
    *,
    idle_ranks: bool = False,
    tables: Mapping[str, Requested] | None = None,
    examples: int | None = None,
    copies: Collection[int] | None = None,
) -> tuple[Shard, ...]:
    """Shards of every table, the same on every rank, in table order and then in the order of their slices.

    The most expensive tables come first, and each piece goes to the rank with the least cost so far. "table": whole
    tables. "column": every table split into columns over all ranks, in multiples of four and as even as those allow; a
    table with fewer multiples than ranks goes to the ranks with the least cost. Others: see plans.py.

    Args:
        idle_ranks: whether a rank may hold nothing; with other kinds than "table" and "column" it always may.
        tables: the kinds of tables that differ.
        examples: see `plan_tables`.
        copies: see `lay_out`.

    Raises:
        UserError: a rank would hold nothing; the message has the arithmetic and a remedy.
    """
    shards = lay_out(layout, choose_plans(layout, kind, world_size, tables or {}, examples), world_size, copies)
    must_hold = layout.tables and kind in ("table", "column") and not tables and not idle_ranks
    if must_hold and len({shard.rank for shard in shards}) < world_size:
        raise UserError(_idle_ranks(layout, kind, world_size))
    return shards


def place_on_hosts(
    hosts: Sequence[EmbeddingLayout],
    kind: Requested,
    ranks_per_host: int,
    *,
    tables: Mapping[str, Requested] | None = None,
    examples: int | None = None,
) -> tuple[Shard, ...]:
    """`place` inside every host: hosts[h] is what host h holds; ranks are those of the whole job."""
    return tuple(
        dataclasses.replace(shard, rank=host * ranks_per_host + shard.rank)
        for host, layout in enumerate(hosts)
        for shard in place(layout, kind, ranks_per_host, idle_ranks=True, tables=tables, examples=examples)
    )


def choose_plans(
    layout: EmbeddingLayout, kind: Requested, ranks: int, tables: Mapping[str, Requested], examples: int | None
) -> dict[str, TablePlan]:
    """`plan_tables` with as few tables split as balance allows: the first threshold of 1, 2 and 4 with which the
    fullest rank has at most `EVEN` times the mean, or a tenth more than with the most even one."""
    plans = [plan_tables(layout, kind, ranks, tables, examples, split_threshold) for split_threshold in (1, 2, 4)]
    if plans[0] == plans[-1]:
        return plans[0]
    uneven = [imbalance(layout, plans[0], ranks)]
    if uneven[0] <= EVEN:
        return plans[0]
    uneven += [imbalance(layout, plan, ranks) for plan in plans[1:]]
    accepted = max(EVEN, 1.1 * min(uneven))
    return next(plan for plan, value in zip(plans, uneven, strict=True) if value <= accepted)


def imbalance(layout: EmbeddingLayout, plans: Mapping[str, TablePlan], ranks: int) -> float:
    """The largest ratio of a rank to the mean: of cells held, of columns read, or of columns sent."""
    read, features = (dict.fromkeys((table.name for table in layout.tables), 0.0) for _ in range(2))
    for feature in layout.looked_up:
        read[feature.table] += feature.columns * feature.mean_length
        features[feature.table] += _sent_rows(layout, feature)
    cells, columns, sent = [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
    assigned = _assign(layout, plans, ranks)

    def add(rank: int, table: Table, rows: int, width: int) -> None:
        cells[rank] += rows * width
        columns[rank] += read[table.name] * (rows * width / (table.rows * table.columns))
        sent[rank] += width * features[table.name]

    for table in layout.tables:
        if plans[table.name].kind == "replicated":
            cells = [own + table.rows * table.columns for own in cells]
            columns = [own + read[table.name] * (1 / ranks) for own in columns]
        elif plans[table.name].kind == "row":
            for rank, (start, stop) in enumerate(even_ranges(table.rows, ranks)):
                add(rank, table, stop - start, table.columns)
        else:
            for rank, (start, stop) in assigned[table.name]:
                add(rank, table, table.rows, stop - start)
    return max(max(load) * ranks / (sum(load) or 1.0) for load in (cells, columns, sent))


def lay_out(
    layout: EmbeddingLayout, plans: Mapping[str, TablePlan], ranks: int, copies: Collection[int] | None = None
) -> tuple[Shard, ...]:
    """Give the pieces of every table to ranks.

    Args:
        copies: the ranks whose copies of replicated tables are listed; None: all.
    """
    assigned, shards = _assign(layout, plans, ranks), list[Shard]()
    for table in layout.tables:
        name, rows, columns = table.name, table.rows, table.columns
        if plans[name].kind == "row":
            shards += [Shard(name, rank, *own, 0, columns) for rank, own in enumerate(even_ranges(rows, ranks))]
        elif plans[name].kind == "replicated":
            held = range(ranks) if copies is None else copies
            shards += [Shard(name, rank, 0, rows, 0, columns) for rank in held]
        else:
            shards += [Shard(name, rank, 0, rows, *own) for rank, own in assigned[name]]
    return tuple(shards)


def _assign(
    layout: EmbeddingLayout, plans: Mapping[str, TablePlan], ranks: int
) -> dict[str, list[tuple[int, tuple[int, int]]]]:
    """(rank, columns) of every piece of the tables that do not lie on all ranks."""
    costs = table_costs(layout)
    load = [0.0] * ranks
    everywhere = {table.name for table in layout.tables if plans[table.name].kind in ("row", "replicated")}
    found: dict[str, list[tuple[int, tuple[int, int]]]] = {}
    lightest: list[tuple[float, int]] = []  # a heap, from the first table on that does not lie on all ranks
    for table in sorted(layout.tables, key=lambda table: (table.name not in everywhere, -costs[table.name])):
        size = table.rows * table.columns
        if plans[table.name].kind == "row":
            for rank, (start, stop) in enumerate(even_ranges(table.rows, ranks)):
                load[rank] += costs[table.name] * (stop - start) * table.columns / size
        elif plans[table.name].kind == "replicated":
            cost = costs[table.name] * table.rows * table.columns / size
            load = [own + cost for own in load]
        else:
            if not lightest:
                lightest = sorted((own, rank) for rank, own in enumerate(load))
            columns = _even_columns(table, plans[table.name].parts)  # wider slices come first: to the lighter ranks
            takers = [heapq.heappop(lightest)[1] for _ in columns]
            found[table.name] = list(zip(takers, columns, strict=True))
            for rank, (start, stop) in found[table.name]:
                load[rank] += costs[table.name] * table.rows * (stop - start) / size
                heapq.heappush(lightest, (load[rank], rank))
    return found


def split_by_rows(shards: Sequence[Shard]) -> set[str]:
    """The tables whose rows lie on several ranks."""
    return {shard.table for shard in shards if shard.row_start > 0}


def replicated(shards: Sequence[Shard]) -> set[str]:
    """The tables that several ranks hold a copy of."""
    holders = Counter((s.table, s.row_start, s.row_stop, s.column_start, s.column_stop) for s in shards)
    return {table for (table, *_), count in holders.items() if count > 1}


def even_ranges(rows: int, parts: int) -> list[tuple[int, int]]:
    """`rows` cut into `parts` ranges whose sizes differ by at most one, larger ones first."""
    sizes = [rows // parts + (part < rows % parts) for part in range(parts)]
    return list(itertools.pairwise([0, *itertools.accumulate(sizes)]))


def _idle_ranks(layout: EmbeddingLayout, kind: str, world_size: int) -> str:
    if kind == "table":
        return (
            f'embedding.placement="table" cannot give {world_size} ranks a table each: {len(layout.tables)} tables '
            f'< {world_size} ranks; set embedding.placement="column" or use at most {len(layout.tables)} ranks'
        )
    pieces = sum(min(world_size, column_units(table)) for table in layout.tables)
    listed = ", ".join(f"{table.name} {table.columns}" for table in layout.tables)
    return (
        f'embedding.placement="column" cannot give {world_size} ranks a slice each: the tables have {pieces} '
        f"slices of {COLUMN_UNIT} columns (columns: {listed}); widen model.dim or use at most {pieces} ranks"
    )


def _even_columns(table: Table, parts: int) -> list[tuple[int, int]]:
    """`parts` ranges of columns in multiples of four; the last takes what does not divide by four."""
    ranges = even_ranges(column_units(table), parts)
    return [(COLUMN_UNIT * start, min(COLUMN_UNIT * stop, table.columns)) for start, stop in ranges]
