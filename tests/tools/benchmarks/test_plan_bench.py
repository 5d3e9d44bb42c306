"""`bench.py plan` sets predictions beside measured steps, and counts the order of those that differ."""

import json
import re
from pathlib import Path

import pytest

from megarec.errors import UserError
from tools.benchmarks import plan


def test_the_published_table() -> None:
    """What docs/where_towers_pay.md says of it; a new table or new constants come with new words there."""
    result = plan.run()
    assert len(result["rows"]) == 56
    ratios = result["ratios"]
    assert ratios["order_right"] == 1.0 and ratios["pairs_that_differ"] > 50
    assert ratios["within_20_percent"] >= 0.85


def test_order_counts_where_steps_differ() -> None:
    def row(measured: float, predicted: float, link: float = 1.0) -> dict[str, object]:
        error = predicted / measured - 1
        return {"model": "dlrm", "link_gbit": link, "step_ms": measured, "predicted_ms": predicted, "error": error}

    found = plan.ratios([row(100, 100), row(110, 90), row(200, 50), row(1000, 1, link=2.5)])
    assert found["pairs_that_differ"] == 2 and found["order_right"] == 0
    assert found["largest_error"] == pytest.approx(0.999) and found["within_20_percent"] == 0.5


@pytest.mark.parametrize(
    ("machines", "said"),
    [
        ([], "no machines; `bench.py towers --json` of this version measures them"),
        ([{"link_gbit": 1.0, "machine": {"name": "x"}}], "link 1: what is missing"),
        ([{"link": 1.0}], "machines are not those of `bench.py towers`"),
    ],
)
def test_a_file_without_good_machines(machines: list[object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"machines": machines}))
    with pytest.raises(UserError, match=re.escape(said)):
        plan.read_machines(path)


@pytest.mark.parametrize("rows", [[], [{"model": "dlrm", "variant": "flat"}], [3]])
def test_another_file(rows: list[object], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": rows}))
    with pytest.raises(UserError, match=r"rows\.json: .*`bench.py towers`"):
        plan.read_rows(path)
