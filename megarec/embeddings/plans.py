"""How every table is laid out over the ranks of its group, and why.

table       whole, on one rank
column      columns split over some ranks, in multiples of four
row         rows split over all ranks: an example's embedding is the sum of what every rank found
replicated  a copy on every rank: nothing is sent but the gradients of its rows
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megarec.config.sections import Placement
from megarec.data.schema import did_you_mean
from megarec.embeddings.layout import EmbeddingLayout, Table
from megarec.errors import UserError

Kind = Literal["table", "column", "row", "replicated"]
Wish = Placement

COLUMN_UNIT = 4  # FBGEMM wants widths in multiples of four
WIDE = 16  # columns of a slice: a cache line of float32
LARGE = 1.5  # of a rank's fair share of the cost
COPY_CELLS = 2**18  # a copy of at most 1 MiB in float32


@dataclass(frozen=True)
class TablePlan:
    """One table's kind.

    Attributes:
        parts: on how many ranks the table lies.
        why: for people.
    """

    kind: Kind
    parts: int
    why: str


def plan_tables(
    layout: EmbeddingLayout, wish: Wish, ranks: int, tables: Mapping[str, Wish], examples: int | None, grain: int = 1
) -> dict[str, TablePlan]:
    """The plan of every table, in table order; the same on every rank.

    Args:
        wish: for the tables that `tables` does not name.
        ranks: of the group that holds these tables.
        examples: of one rank of the group in a step, by which "auto" judges copies; None: it makes none.
        grain: "auto" leaves a table whole up to 1 / grain of a rank's fair share of the cost of all that are no copies.
    """
    wishes: dict[str, Wish] = {table.name: tables.get(table.name, wish) for table in layout.tables}
    copied = {
        t.name for t in layout.tables if wishes[t.name] == "auto" and ranks > 1 and _copy_pays(layout, t, examples)
    }
    copies = copied | {name for name, wished in wishes.items() if wished == "replicated"}
    costs = table_costs(layout)
    share = sum(cost for name, cost in costs.items() if name not in copies) / ranks
    plans = {}
    for table in layout.tables:
        wished, why = wishes[table.name], f'embedding.placement="{wish}"'
        if table.name in tables:
            why = f'embedding.tables.{table.name}.placement="{wished}"'
        if ranks == 1:
            plans[table.name] = TablePlan("table", 1, "one rank")
        elif wished != "auto":
            plans[table.name] = _as_wished(table, wished, ranks, why)
        elif table.name in copied:
            rows = (examples or 0) * _features(layout, table)
            plans[table.name] = TablePlan("replicated", ranks, f"{table.rows:,} rows, {rows:,} looked up by a rank")
        else:
            plans[table.name] = _automatic(table, costs[table.name] / share, grain, ranks)
    return plans


def table_costs(layout: EmbeddingLayout) -> dict[str, float]:
    """Cost of a table: its share of all bytes plus its share of all columns read (list length x columns a feature)."""
    size = {table.name: float(table.rows * table.columns) for table in layout.tables}
    traffic = dict.fromkeys(size, 0.0)
    for feature in layout.features:
        traffic[feature.table] += feature.columns * feature.mean_length
    bytes_total, traffic_total = sum(size.values()), sum(traffic.values())
    return {name: size[name] / bytes_total + traffic[name] / traffic_total for name in size}


def check_table_names(parts: Sequence[EmbeddingLayout], tables: Collection[str]) -> None:
    """Raise a UserError for a table in `embedding.tables` that none of the layouts has."""
    known = [table.name for layout in parts for table in layout.tables]
    for name in tables:
        if name not in known:
            raise UserError(f"embedding.tables.{name}: the model has no such table; {did_you_mean(name, known)}")


def column_units(table: Table) -> int:
    return math.ceil(table.columns / COLUMN_UNIT)


def _copy_pays(layout: EmbeddingLayout, table: Table, examples: int | None) -> bool:
    """Whether a copy on every rank at most halves what the table sends.

    In a group of G a copy sends 2 (G-1)/G rows x columns for the gradients (an all-reduce); on one rank the table sends
    2 (G-1)/G examples x features x columns for embeddings and their gradients, and the ids.
    """
    if examples is None or table.rows * table.columns > COPY_CELLS:
        return False
    return 2 * table.rows <= examples * _features(layout, table)


def _features(layout: EmbeddingLayout, table: Table) -> int:
    return sum(feature.table == table.name for feature in layout.features)


def _as_wished(table: Table, wish: Kind, ranks: int, why: str) -> TablePlan:
    if wish == "replicated":
        return TablePlan("replicated", ranks, why)
    if wish == "row" and table.rows < ranks:
        return TablePlan("table", 1, f"{why}, but {table.rows} rows < {ranks} ranks")
    if wish == "row":
        return TablePlan("row", ranks, why)
    parts = min(ranks, column_units(table)) if wish == "column" else 1
    return TablePlan("table" if parts == 1 else "column", parts, why)


def _automatic(table: Table, shares: float, grain: int, ranks: int) -> TablePlan:
    """Whole where it fits; else in columns, which send no more than a whole table; rows, of which every rank sends as
    much as a whole table, only where the widest useful split leaves slices of more than `LARGE` fair shares.

    Args:
        shares: cost of the table in fair shares of a rank.
    """
    parts = min(ranks, math.ceil(shares * grain - 1e-9))
    slices = min(parts, max(1, table.columns // WIDE))
    why = f"{shares:.2f} of a fair share"
    if shares / slices > LARGE and table.rows >= ranks:
        return TablePlan("row", ranks, f"{why}, {shares / slices:.2f} in slices of {WIDE} columns")
    if slices > 1:
        return TablePlan("column", slices, f"{why}, slices of at least {WIDE} columns")
    return TablePlan("table", 1, why)
