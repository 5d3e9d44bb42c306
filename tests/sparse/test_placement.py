import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megarec.errors import UserError
from megarec.sparse.layout import EmbeddingLayout, Feature, Table
from megarec.sparse.placement import Shard, place, table_costs


def layout_of(sizes: list[tuple[int, int]], sharing: int = 0) -> EmbeddingLayout:
    """Tables of (rows, columns), one feature each; the first has `sharing` features more."""
    tables = tuple(Table(f"t{index}", rows, columns) for index, (rows, columns) in enumerate(sizes))
    users = [*tables, *[tables[0]] * sharing]
    features, start = [], 0
    for index, table in enumerate(users):
        features.append(Feature(f"f{index}", table.name, "sum", False, start, table.columns))
        start += table.columns
    return EmbeddingLayout(4, tables, tuple(features), 0, start)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 21)), min_size=1, max_size=7),
    kind=st.sampled_from(["table", "column"]),
    ranks=st.integers(1, 9),
)
def test_shards_tile_every_table_exactly(sizes: list[tuple[int, int]], kind: str, ranks: int) -> None:
    layout = layout_of(sizes)
    try:
        shards = place(layout, kind, ranks)  # type: ignore[arg-type]
    except UserError:
        pieces = len(sizes) if kind == "table" else sum(min(ranks, -(-columns // 4)) for _, columns in sizes)
        assert pieces < ranks
        return
    assert {shard.rank for shard in shards} == set(range(ranks))
    for table in layout.tables:
        mine = [shard for shard in shards if shard.table == table.name]
        holders = torch.zeros(table.rows, table.columns, dtype=torch.int64)
        for shard in mine:
            holders[shard.slices] += 1
        assert (holders == 1).all()
        assert len({shard.rank for shard in mine}) == len(mine), "one shard of a table on a rank"
        if kind == "table":
            assert len(mine) == 1
        else:
            assert len(mine) == min(ranks, -(-table.columns // 4))
            units = [-(-shard.columns // 4) for shard in mine]
            assert max(units) - min(units) <= 1
            assert all(shard.column_start % 4 == 0 for shard in mine)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 64)), min_size=2, max_size=12),
    ranks=st.integers(2, 4),
    sharing=st.integers(0, 3),
)
def test_greedy_balance(sizes: list[tuple[int, int]], ranks: int, sharing: int) -> None:
    """A rank exceeds the lightest by at most its lightest table: each table goes to the lightest rank."""
    assume(len(sizes) >= ranks)
    layout = layout_of(sizes, sharing)
    costs = table_costs(layout)
    assert sum(costs.values()) == pytest.approx(3.0)
    held = {rank: [costs[s.table] for s in place(layout, "table", ranks) if s.rank == rank] for rank in range(ranks)}
    lightest = min(sum(costs) for costs in held.values())
    for costs_of_rank in held.values():
        assert sum(costs_of_rank) - min(costs_of_rank) <= lightest + 1e-9


def test_cost_counts_bytes_lookups_and_what_is_sent() -> None:
    layout = layout_of([(10, 4), (30, 4)], sharing=1)  # t0: 40 of 160 cells, 8 of 12 columns that are sent
    assert table_costs(layout) == pytest.approx({"t0": 40 / 160 + 2 * 8 / 12, "t1": 120 / 160 + 2 * 4 / 12})
    long = dataclasses.replace(layout.features[-1], mean_length=7.0)
    lists = dataclasses.replace(layout, features=(*layout.features[:-1], long))
    owner = long.table
    assert table_costs(lists)[owner] > table_costs(layout)[owner]


def test_what_cannot_be_placed_says_why() -> None:
    with pytest.raises(UserError, match=r'2 tables < 3 ranks; set embedding.placement="column"'):
        place(layout_of([(10, 8), (10, 8)]), "table", 3)
    with pytest.raises(UserError, match=r"3 slices of 4 columns \(columns: t0 8, t1 4\).*at most 3 ranks"):
        place(layout_of([(10, 8), (10, 4)]), "column", 4)


def test_slices_of_state_per_row_and_per_table() -> None:
    shard = Shard("t", 2, row_start=3, row_stop=8, column_start=4, column_stop=12)
    assert (shard.rows, shard.columns, shard.slices) == (5, 8, (slice(3, 8), slice(4, 12)))
    assert shard.per_row.slices == (slice(3, 8), slice(0, 1))
    assert shard.per_table.slices == (slice(0, 1), slice(0, 1))


def test_lists_that_are_always_empty_cost_bytes_and_what_is_sent() -> None:
    layout = layout_of([(10, 4)], sharing=1)
    unread = dataclasses.replace(
        layout, features=tuple(dataclasses.replace(f, mean_length=0.0) for f in layout.features)
    )
    assert table_costs(unread) == {"t0": 2.0}
