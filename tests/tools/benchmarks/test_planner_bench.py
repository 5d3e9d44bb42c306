"""The planner beside MLPerf's measured systems: the published bound, and a table that is none."""

from pathlib import Path

import pytest

from megarec.errors import UserError
from megarec.planning.hardware import load_hardware
from megarec.planning.pieces import timeline
from megarec.planning.step_time import pieces_of
from tools.benchmarks import anchors, planner
from tools.benchmarks.planner import Cell, Measured


def test_measured_systems() -> None:
    """48 rows of eight kinds of system; the fit itself is the benchmark's."""
    measured = planner.read_rows(planner.PUBLISHED)
    assert len(measured) == 48 and len(planner.medians(measured)) == 8
    errors = [planner.predict(row.cell) / row.step_ms - 1 for row in measured]
    assert planner.geometric_mean(errors) < 0.035
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


@pytest.mark.parametrize("kind", ["h200", "gb200", "l40s", "a40"])
def test_faster_links_and_more_hosts_never_cost(kind: str) -> None:
    hardware, dense = load_hardware(kind), []
    for hosts in (1, 4, 16):
        cell = Cell(kind, hosts, 4, 65536)
        base, work = planner.predict(cell), planner._works[cell]
        dense.append(timeline(pieces_of(work, hardware)).busy["dense compute"])
        for key in ("host_link_gb_s", "host_ring_gb_s", "network_gb_s", "memory_tb_s", "gemm_tflops"):
            figure = getattr(hardware, key)
            if figure is not None:
                faster = hardware.model_copy(update={key: figure.model_copy(update={"value": 3 * figure.value})})
                assert 1e3 * timeline(pieces_of(work, faster)).seconds <= base * (1 + 1e-9), (hosts, key)
    assert dense == sorted(dense, reverse=True)


@pytest.mark.parametrize("kind", ["h200", "b200", "l40s", "a40", "h100-pcie"])
def test_crossing_a_boundary(kind: str) -> None:
    """No less than half a percent, no more than half of the step, at equal cards and batch."""
    apart, together = (planner.predict(Cell(kind, hosts, 8 // hosts, 55296)) for hosts in (2, 1))
    assert 0.995 < apart / together < 1.5


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
    assert found["the same, 128 H100"].predict() == pytest.approx(51, rel=0.25)
    assert found["DLRM-DCNv2, 8 A100, 16,384 a GPU"].predict() == pytest.approx(1.19, rel=0.25)
