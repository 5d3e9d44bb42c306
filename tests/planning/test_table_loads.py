"""What ranks move for their tables, by hand; and the planner tells good placements of tables from bad ones."""

import pytest

from megarec.planning.hardware import load_hardware
from megarec.planning.planner import placement_seconds
from megarec.planning.table_loads import Load, loads
from megarec.planning.work import work_of
from tests.planning.small_tables import COLUMNS, EXAMPLES, ROWS, halves, run, whole


def test_by_hand() -> None:
    """A row of row-wise Adagrad: 4 bytes a column, a sum and a flag; of sorting 96 bytes an id."""
    config, spec = run(2)
    long, short = loads(config, spec, [whole("t0", 0), whole("t1", 1)], 2)
    touched = [ROWS * (1 - (1 - 1 / ROWS) ** (ids * EXAMPLES)) for ids in (5, 1)]
    for load, ids, rows in ((long, 5, touched[0]), (short, 1, touched[1])):
        assert load.lookup == ids * EXAMPLES * (4 * COLUMNS + 4)
        assert load.update == pytest.approx(ids * EXAMPLES * 96 + 2 * rows * (4 * COLUMNS + 4 + 1), rel=2e-3)
        assert load.glue == 24 * COLUMNS * EXAMPLES
        assert load.skewed < load.update, "popular rows are asked for again"
    assert loads(config, spec, [whole("t0", 0), whole("t1", 0)], 2)[1] == Load(0, 0, 0, 0)


def test_what_a_split_costs() -> None:
    """All ids on both ranks by columns; half of them, and all pooled columns, on both by rows."""
    config, spec = run(1)
    (table, _), (column, other), (row, _) = (
        loads(config, spec, shards, 2) for shards in ([whole("t0", 0)], halves("t0", "columns"), halves("t0", "rows"))
    )
    ids = 5 * EXAMPLES
    assert column == other and column.lookup == ids * (2 * COLUMNS + 4) and row.lookup == table.lookup / 2
    assert column.update > table.update / 2 == pytest.approx(row.update)
    assert row.glue == table.glue == 2 * column.glue
    (copy, same) = loads(config, spec, [whole("t0", 0), whole("t0", 1)], 2)
    assert copy == same and copy.lookup == table.lookup / 2 and copy.update > table.update / 2


def test_the_slowest_rank_counts() -> None:
    config, spec = run(4)
    even = [whole("t0", 0), *(whole(f"t{i}", 1) for i in (1, 2, 3))]
    uneven = [whole("t1", 1), *(whole(f"t{i}", 0) for i in (0, 2, 3))]
    larger = run(4, 2**20)  # small work hides behind an accelerator's starts
    for machine, hosts, ranks in (("epyc-2-cores", 1, 2), ("h100", 1, 2), ("h100", 2, 1)):
        hardware = load_hardware(machine)
        seconds = [placement_seconds(*larger, hardware, hosts, ranks, shards) for shards in (even, uneven)]
        assert seconds[0] < seconds[1], machine
    sent = {(m.op, m.direction): m.bytes for m in work_of(config, spec, 1, 2, uneven, slowest=True).messages}
    columns = 3 * COLUMNS * EXAMPLES // 2 * 4  # of three tables, for the other rank's half of the examples
    assert sent["all_to_all embeddings", "forward"] == sent["all_to_all embeddings", "backward"] == columns
    assert sent["all_to_all ids", "forward"] == 7 * EXAMPLES // 2 * 4, "that rank 1 sends to rank 0"
