"""The placer: which rank gets what, that nothing is lost, and the reasons."""

import itertools
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.config.sections import RunConfig
from megarec.data.schema import CategoricalFeature, Schema
from megarec.distributed.topology import Topology
from megarec.errors import UserError
from megarec.sparse.layout import EmbeddingLayout, Feature, Table, build_layout
from megarec.sparse.lookups import plan_lookups
from megarec.sparse.placement import (
    Requested,
    Shard,
    check_table_names,
    choose_plans,
    imbalance,
    place,
    place_on_hosts,
    plan_tables,
    replicated,
)
from megarec.sparse.run_placement import explain
from megarec.sparse.towers.sizes import resolve_towers
from tests.processes import python

ROOT = Path(__file__).parents[2]
WISHES = ("auto", "table", "column", "row", "replicated")


def layout_of(sizes: list[tuple[int, int]]) -> EmbeddingLayout:
    """Tables of (rows, columns), one feature each."""
    tables = tuple(Table(f"t{index}", rows, columns) for index, (rows, columns) in enumerate(sizes))
    starts = [sum(columns for _, columns in sizes[:index]) for index in range(len(sizes))]
    features = tuple(Feature(t.name, t.name, "sum", False, at, t.columns) for t, at in zip(tables, starts, strict=True))
    return EmbeddingLayout(4, tables, features, 0, sum(columns for _, columns in sizes))


def check_cells(layout: EmbeddingLayout, shards: tuple[Shard, ...], ranks: int) -> None:
    """Every cell lies on exactly one rank, or on every rank where the table is replicated."""
    copies = replicated(shards)
    for table in layout.tables:
        mine = [shard for shard in shards if shard.table == table.name]
        holders = torch.zeros(table.rows, table.columns, dtype=torch.int64)
        for shard in mine:
            holders[shard.slices] += 1
        assert (holders == (ranks if table.name in copies else 1)).all()
        assert len({shard.rank for shard in mine}) == len(mine), "at most one shard of a table on a rank"
        assert all(0 <= shard.rank < ranks and shard.rows > 0 and shard.columns > 0 for shard in mine)


@given(
    sizes=st.lists(st.tuples(st.integers(9, 20), st.sampled_from([4, 8])), min_size=1, max_size=6),
    wishes=st.lists(st.sampled_from(["table", "column", "row"]), min_size=6, max_size=6),
    backends=st.lists(st.sampled_from(["fbgemm", "triton", "torch"]), min_size=6, max_size=6),
    ranks=st.integers(1, 4),
)
@settings(deadline=None)
def test_torch_has_one_group_a_rank_whatever_falls_back_to_it(
    sizes: list[tuple[int, int]], wishes: list[Requested], backends: list[str], ranks: int
) -> None:
    """It may take part in one exchange of row-wise Adagrad over column slices a step, as every other rank does."""
    layout = layout_of(sizes)
    names = [table.name for table in layout.tables]
    shards = place(layout, "table", ranks, idle_ranks=True, tables=dict(zip(names, wishes, strict=False)))
    held = dict(zip(names, backends, strict=False))
    fused, triton = ([name for name in names if held[name] == backend] for backend in ("fbgemm", "triton"))
    split_by_rows = []
    for slots in plan_lookups(layout, shards, ranks, fused, triton).slots:
        chosen = [held[slot.shard.table] for slot in slots]
        for row in (chosen, ["torch" if backend == "triton" else backend for backend in chosen]):
            assert [backend for backend, _ in itertools.groupby(row)].count("torch") <= 1
        assert [by_rows for by_rows, _ in itertools.groupby(slot.by_rows for slot in slots)].count(True) <= 1
        split_by_rows.append([slot.feature.name for slot in slots if slot.by_rows])
    assert all(of_rank == split_by_rows[0] for of_rank in split_by_rows)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.sampled_from([3, 4, 8, 16, 40, 64])), min_size=1, max_size=7),
    wish=st.sampled_from(WISHES),
    others=st.dictionaries(st.integers(0, 6), st.sampled_from(WISHES)),
    ranks=st.integers(1, 9),
    examples=st.sampled_from([None, 4, 100]),
)
@settings(deadline=None)
def test_every_cell_exactly_once_or_on_every_rank(
    sizes: list[tuple[int, int]], wish: Requested, others: dict[int, Requested], ranks: int, examples: int | None
) -> None:
    layout = layout_of(sizes)
    tables = {f"t{index}": other for index, other in others.items() if index < len(sizes)}
    shards = place(layout, wish, ranks, idle_ranks=True, tables=tables, examples=examples)
    check_cells(layout, shards, ranks)
    plans = choose_plans(layout, wish, ranks, tables, examples)
    for table in layout.tables:
        mine = [shard for shard in shards if shard.table == table.name]
        plan = plans[table.name]
        assert (len(mine), ranks == 1 or plan.kind == "replicated") == (
            plan.parts,
            table.name in replicated(shards) or ranks == 1,
        )
        if plan.kind == "row":
            assert max(s.rows for s in mine) - min(s.rows for s in mine) <= 1
            assert [shard.rank for shard in mine] == list(range(ranks))


@given(count=st.integers(1, 40), ranks=st.integers(1, 16), rows=st.integers(64, 5000))
@settings(deadline=None)
def test_equal_tables_lie_evenly(count: int, ranks: int, rows: int) -> None:
    layout = layout_of([(rows, 64)] * count)
    found = imbalance(layout, choose_plans(layout, "auto", ranks, {}, None), ranks)
    pieces = count * min(4, ranks)  # what slices of 16 columns allow
    assert found <= max(1.25, 1.1 * math.ceil(pieces / ranks) * ranks / pieces) + 1e-9


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_26_equal_tables_stay_whole(ranks: int) -> None:
    layout = layout_of([(200_000, 64)] * 26)
    shards = place(layout, "auto", ranks, examples=2048)
    assert shards == place(layout, "table", ranks)
    held = [sum(shard.rank == rank for shard in shards) for rank in range(ranks)]
    assert max(held) == math.ceil(26 / ranks)


def test_large_tables_are_split_by_columns_where_wide_and_by_rows_where_narrow() -> None:
    wide = plan_tables(layout_of([(10_000, 64), (100, 64)]), "auto", 4, {}, None)["t0"]
    assert (wide.kind, wide.parts, "slices of at least 16 columns" in wide.why) == ("column", 3, True)
    narrow = plan_tables(layout_of([(10_000, 16), (100, 16)]), "auto", 4, {}, None)["t0"]
    assert (narrow.kind, narrow.parts) == ("row", 4)
    assert narrow.why == "2.65 of a fair share, 2.65 in slices of 16 columns"
    many = plan_tables(layout_of([(10_000, 64), (100, 64)]), "auto", 16, {}, None)["t0"]
    assert (many.kind, many.parts) == ("column", 11), "over many ranks rows send too much"
    short = plan_tables(layout_of([(3, 16)]), "auto", 4, {}, None)["t0"]
    assert short.kind == "table", "three rows are not for four ranks"


def test_a_copy_where_it_halves_what_is_sent() -> None:
    """Rows against examples x features: 500 rows pay from 1,000 looked-up rows a rank on."""
    layout = layout_of([(500, 8), (500_000, 8), (500_001, 8)])
    assert plan_tables(layout, "auto", 2, {}, 1000)["t0"].kind == "replicated"
    assert plan_tables(layout, "auto", 2, {}, 999)["t0"].kind == "table"
    assert plan_tables(layout, "auto", 2, {}, None)["t0"].kind == "table"
    assert plan_tables(layout, "auto", 1, {}, 1000)["t0"].kind == "table", "one rank has nobody to send to"
    assert plan_tables(layout, "auto", 2, {}, 10**7)["t1"].kind == "table", "more than 1 MiB"


def test_overrides_and_their_reasons() -> None:
    plans = plan_tables(layout_of([(50, 8), (50, 8), (2, 8)]), "table", 4, {"t0": "row", "t2": "row"}, None)
    assert [plan.kind for plan in plans.values()] == ["row", "table", "table"]
    assert plans["t0"].why == 'embedding.tables.t0.placement="row"'
    assert plans["t1"].why == 'embedding.placement="table"'
    assert plans["t2"].why == 'embedding.tables.t2.placement="row", but 2 rows < 4 ranks'
    with pytest.raises(UserError, match=r"embedding.tables.t3: the model has no such table; known: t0"):
        check_table_names([layout_of([(50, 8)])], {"t0": "row", "t3": "row"})


def test_more_ranks_than_tables() -> None:
    layout = layout_of([(40, 64), (40, 64)])
    shards = place(layout, "auto", 8)
    assert {shard.rank for shard in shards} == set(range(8))
    check_cells(layout, shards, 8)
    with pytest.raises(UserError, match="2 tables < 8 ranks"):
        place(layout, "table", 8)


def test_inside_hosts() -> None:
    hosts = [layout_of([(40, 8), (8, 8)]), layout_of([(60, 16)])]
    shards = place_on_hosts(hosts, "row", 2)
    assert [(s.table, s.rank, s.rows) for s in shards] == [
        ("t0", 0, 20), ("t0", 1, 20), ("t1", 0, 4), ("t1", 1, 4), ("t0", 2, 30), ("t0", 3, 30),
    ]  # fmt: skip


SCHEMA = Schema(
    name="made up",
    categorical=(
        CategoricalFeature(name="user", rows=6_000),
        CategoricalFeature(name="item", rows=900),
        CategoricalFeature(name="history", rows=900, multi_valued=True, table="item"),
        CategoricalFeature(name="sex", rows=3),
    ),
    rows={},
)


def config_of(**sections: Any) -> RunConfig:
    model = {"name": "wukong", "dim": 16}
    return RunConfig.model_validate({"model": model, "data": {"path": "", "batch_size": 512}, **sections})


def test_explanation() -> None:
    config = config_of(embedding={"placement": "auto", "tables": {"item": {"placement": "row"}}})
    layout = build_layout(SCHEMA, config.embedding, 16)
    found = explain(config, layout, resolve_towers(config, layout), Topology(0, 4, 2, 1))
    by_name = {table.table: table for table in found.tables}
    assert {name: table.kind for name, table in by_name.items()} == {"user": "row", "item": "row", "sex": "replicated"}
    assert by_name["sex"].bytes == 4 * 4 * 3 * 16
    assert [load.bytes for load in found.ranks] == [4 * 16 * (1500 + 225 + 3)] * 4
    assert [load.state_bytes for load in found.ranks] == [(4 + 1) * (1500 + 225 + 3)] * 4  # square sums, touched flags
    assert by_name["sex"].state_bytes == 4 * (4 + 1) * 3
    assert sum(load.lookups for load in found.ranks) == pytest.approx(512 * 4)
    assert found.imbalance == {"bytes": 1.0, "lookups": pytest.approx(1.0)}
    first, *others = found.lines()
    assert first == "placement: 2 by rows, 1 replicated; largest rank over the mean: bytes 1.00, lookups 1.00"
    assert others[1] == 'placement: item by rows on 4 ranks (embedding.tables.item.placement="row")'


def test_explanation_of_towers() -> None:
    towers = {"exchange": "tower", "towers": [["user"], ["item", "history", "sex"]]}
    config = config_of(parallel=towers, embedding={"placement": "row"})
    layout = build_layout(SCHEMA, config.embedding, 16)
    found = explain(config, layout, resolve_towers(config, layout), Topology(0, 4, 2, 1))
    assert [(t.table, t.host, t.ranks) for t in found.tables] == [
        ("user", 0, (0, 1)), ("item", 1, (2, 3)), ("sex", 1, (2, 3)),
    ]  # fmt: skip
    assert [round(load.lookups) for load in found.ranks] == [256, 256, 853, 683]


def tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    config = ROOT / "ds_configs/dlrm-criteo-terabyte.json"
    monkeypatch.setattr(sys, "argv", ["placement.py", "--config", str(config), *arguments])
    runpy.run_path(str(ROOT / "tools/placement.py"), run_name="__main__")


def test_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tool(monkeypatch, "--hosts", "2", "--ranks-per-host", "2", "--set", "embedding.placement=auto", "--json")
    found = json.loads(capsys.readouterr().out)
    assert len(found["tables"]) == 26 and len(found["ranks"]) == 4
    assert found["imbalance"]["bytes"] <= 1.25
    assert {table["kind"] for table in found["tables"]} == {"table", "column", "replicated"}
    tool(monkeypatch, "--hosts", "1", "--ranks-per-host", "2")
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("largest rank over the mean: bytes ")


def test_tool_with_too_many_ranks() -> None:
    job = ["--config", ROOT / "ds_configs/dlrm-criteo-terabyte.json", "--hosts", 4, "--ranks-per-host", 8]
    done = python(ROOT / "tools/placement.py", *job, real=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "26 tables < 32 ranks" in done.stderr and len(done.stderr.strip().splitlines()) == 1
