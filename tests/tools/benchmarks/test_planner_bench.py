"""The planner beside MLPerf's measured systems: the published bound, and a table that is none."""

from pathlib import Path

import pytest

from megarec.errors import UserError
from tools.benchmarks import anchors, planner
from tools.benchmarks.planner import Cell, Measured


def test_measured_systems() -> None:
    """48 rows of eight kinds of system; the fit itself is the benchmark's."""
    measured = planner.read_rows(planner.PUBLISHED)
    assert len(measured) == 48 and len(planner.medians(measured)) == 8
    errors = [planner.predict(row.cell) / row.step_ms - 1 for row in measured]
    assert planner.geometric_mean(errors) < 0.06
    assert sum(abs(error) < 0.15 for error in errors) >= 43


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        (Cell("h100", 2, 4, 55296), Cell("h100", 1, 8, 55296)),  # half of the exchange crosses
        (Cell("h100-pcie", 2, 4, 55296), Cell("h100", 2, 4, 55296)),
        (Cell("h100", 1, 8, 55296), Cell("h200", 1, 8, 55296)),  # memory alone is faster
        (Cell("a40", 1, 8, 55296), Cell("l40s", 1, 8, 55296)),
        (Cell("b200", 2, 4, 55296), Cell("gb200", 2, 4, 55296)),  # NVLink joins the hosts of an NVL72
    ],
)
def test_what_is_slower(slower: Cell, faster: Cell) -> None:
    assert planner.predict(slower) > 1.02 * planner.predict(faster)


def test_held_out_is_predicted_without_its_rows() -> None:
    cells = [Measured("x", Cell("h100", 1, 8, 55296), 4.1), Measured("y", Cell("b200", 1, 8, 55296), 2.45)]
    guess = planner.fit(planner.medians(cells[:1]))
    assert planner.predict(cells[0].cell, guess) == pytest.approx(4.1, rel=0.02)


@pytest.mark.parametrize("text", ["", "round,submitter\n1,2\n", "accelerator\nTPU\n"])
def test_a_table_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "systems.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"systems\.csv: (not a table like|holds no rows)"):
        planner.read_rows(path)


def test_anchors_stand_beside_predictions() -> None:
    """Those of two runs that are nearly the published ones, and every figure says what differs."""
    found = {anchor.what: anchor for anchor in anchors.ANCHORS}
    assert len(found) < len(anchors.ANCHORS) and all(len(anchor.differs) >= 8 for anchor in anchors.ANCHORS)
    assert found["the same, 128 H100"].predict() == pytest.approx(51, rel=0.1)
    assert found["DLRM-DCNv2, 8 A100, 16,384 a GPU"].predict() == pytest.approx(1.19, rel=0.25)
