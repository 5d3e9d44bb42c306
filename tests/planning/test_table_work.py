"""What a CPU does for tables, counted by hand; and costs are found again from the seconds that they make."""

import pytest

from megarec.planning.hardware import Costs, Hardware, TableCosts, load_hardware
from megarec.planning.measure_tables import Sample, costs_of
from megarec.planning.planner import placement_seconds
from megarec.planning.table_work import Counts, part_seconds, table_work
from tests.planning.small_tables import COLUMNS, EXAMPLES, ROWS, halves, run, whole

KINDS = ("ids", "split", "fbgemm lookup", "fbgemm update", "torch lookup", "torch update", "copy")
LONG, SHORT = 5 * EXAMPLES, EXAMPLES  # ids of both tables
TOUCHED = [ROWS * (1 - (1 - 1 / ROWS) ** ids) for ids in (LONG, SHORT)]


def near(counts: Counts) -> object:
    return pytest.approx(tuple(counts), rel=2e-3)


def test_whole_tables() -> None:
    long, short = table_work(*run(), [whole("t0", 0), whole("t1", 1)], 2, KINDS)
    counts = Counts(1, EXAMPLES, LONG, LONG * COLUMNS)
    assert tuple(long["lookup", "fbgemm lookup"]) == tuple(counts) and ("lookup", "torch lookup") not in long
    assert tuple(long["update", "fbgemm update"]) == near(
        counts._replace(row=TOUCHED[0], row_cell=TOUCHED[0] * COLUMNS)
    )
    assert short["lookup", "fbgemm lookup"].id == SHORT
    half = (LONG + SHORT) / 2  # that a rank sends of both tables
    assert tuple(long["ids", "ids"]) == (1, (EXAMPLES / 2 + EXAMPLES) / 2, (half + LONG) / 2, 0, 0, 0)
    assert short["ids", "ids"].bag == EXAMPLES / 4 and ("ids", "split") not in short
    # Its own examples' part of what it looked up, and no other copy on the way.
    assert long["lookup", "copy"] == long["update", "copy"] == Counts(start=1, cell=EXAMPLES / 2 * COLUMNS)
    placed = Counts(1, bag=EXAMPLES / 2 * 2, cell=EXAMPLES / 2 * 2 * COLUMNS)
    assert long["lookup", "assemble"] == placed and long["back", "scatter"] == placed._replace(start=2)


def test_columns_are_torchs_and_lie_beside_fbgemms() -> None:
    first, second = table_work(*run(), [*halves("t0", "columns"), whole("t1", 1)], 2, KINDS)
    assert tuple(first["lookup", "torch lookup"]) == (1, EXAMPLES, LONG, LONG * COLUMNS / 2, 0, 0)
    assert first["update", "torch update"] == second["update", "torch update"]
    assert ("lookup", "fbgemm lookup") not in first and second["lookup", "fbgemm lookup"].id == SHORT
    both = EXAMPLES * (COLUMNS / 2 + COLUMNS)
    assert second["update", "copy"] == Counts(start=3, bag=2 * EXAMPLES, cell=both + both / 2)
    assert second["lookup", "copy"].cell == both + both / 2
    assert first["lookup", "copy"].cell == EXAMPLES / 2 * COLUMNS / 2, "one backend alone"


def test_rows_are_sorted_by_owner_and_summed() -> None:
    for work in table_work(*run(), [*halves("t0", "rows"), whole("t1", 1)], 2, KINDS):
        assert tuple(work["ids", "split"]) == (1, EXAMPLES / 2, LONG / 2, 0, 0, 0)
    assert work["lookup", "fbgemm lookup"].id == LONG / 2 + SHORT
    split, both = EXAMPLES * COLUMNS, EXAMPLES * 2 * COLUMNS  # the last rank has columns of either kind
    assert work["lookup", "copy"].cell == both + split + split / 2 + both / 2
    assert work["update", "copy"].cell == both + split / 2


def test_copies_are_looked_up_on_the_spot_and_updated_from_a_buffer() -> None:
    first, second = table_work(*run(), [whole("t0", 0), whole("t1", 0), whole("t1", 1)], 2, KINDS)
    for work in (first, second):
        assert tuple(work["lookup", "torch lookup"]) == (1, EXAMPLES / 2, SHORT / 2, SHORT / 2 * COLUMNS, 0, 0)
        assert work["update", "torch update"].row == pytest.approx(TOUCHED[1], rel=2e-3)
        buffer = ROWS * (COLUMNS + 1)
        own = COLUMNS * EXAMPLES / 2 if work is first else 0.0
        assert work["update", "copy"].cell == pytest.approx(own + 2 * buffer + 2 * TOUCHED[1] * COLUMNS, rel=2e-3)
    assert ("lookup", "fbgemm lookup") not in second and second["ids", "ids"].id == LONG / 4


def test_the_slowest_rank_counts_and_what_is_not_known_costs_nothing() -> None:
    hardware = machine({"fbgemm lookup": Costs(id=2.0, cell=1.0), "fbgemm update": Costs(row=3.0)})
    for kinds, second in ((KINDS, 1e-9 * SHORT * (2 + COLUMNS)), ((), 0.0)):
        work = table_work(*run(), [whole("t0", 0), whole("t1", 1)], 2, kinds)
        alone = part_seconds(work[1:], hardware)
        assert alone["lookup"] == pytest.approx(second)
    work = table_work(*run(), [whole("t0", 0), whole("t1", 1)], 2, KINDS)
    found = part_seconds(work, hardware)
    assert found["lookup"] == pytest.approx(1e-9 * LONG * (2 + COLUMNS)) and found["ids"] == 0
    assert found["update"] == pytest.approx(1e-9 * 3 * TOUCHED[0], rel=2e-3)


def machine(costs: dict[str, Costs]) -> Hardware:
    known = load_hardware("epyc-2-cores")
    return known.model_copy(update={"table_ns": TableCosts.model_validate({"value": costs, "source": "x"})})


def test_a_sort_of_every_id_is_felt() -> None:
    """Were torch's ids dear, the pick avoids columns; were FBGEMM's, it takes them."""
    cheap, dear = Costs(id=1.0), Costs(id=1e6)
    columns, tables = [*halves("t0", "columns"), *halves("t1", "columns")], [whole("t0", 0), whole("t1", 1)]
    for torch, fbgemm in ((dear, cheap), (cheap, dear)):
        hardware = machine({"torch update": torch, "fbgemm update": fbgemm, "fbgemm lookup": cheap})
        by_columns, by_table = (placement_seconds(*run(), hardware, 1, 2, own) for own in (columns, tables))
        assert (by_columns > by_table) == (torch is dear)


def test_costs_are_found_again() -> None:
    true = Counts(start=50_000.0, bag=3.0, id=20.0, cell=0.5)
    counts = [Counts(1, bags, bags * length, bags * length * columns, bags, bags * columns)
              for bags in (64, 4096) for length in (1, 8) for columns in (8, 64)]  # fmt: skip
    samples = [Sample("copy", own, 1e-9 * sum(a * b for a, b in zip(own, true, strict=True))) for own in counts]
    found = costs_of(samples)
    assert found.keys() == {"copy"}
    assert found["copy"] == pytest.approx({"start": 50_000.0, "bag": 3.0, "id": 20.0, "cell": 0.5}, rel=1e-6)
