"""What towers cost: differences and deviations by hand, the table and the figure, and refusals in one line."""

import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megarec.errors import UserError
from megarec.scaling.tables import _COLUMNS, _QUALITY
from megarec.scaling.towers import cost_table, costs, plot_costs

FLAT, TOWERS = (0.80, 0.81, 0.79), (0.79, 0.80, 0.78)


def write_runs(path: Path, models: dict[str, tuple[float, ...]]) -> Path:
    """A sweep's table; LogLoss is 1 - AUC, validation's AUC lies 0.1 lower, and a rate lost with 0.1."""
    rows: list[dict[str, Any]] = []
    for model, aucs in models.items():
        for seed, auc in enumerate((*aucs, 0.1)):
            row = dict.fromkeys((*_COLUMNS, *_QUALITY["test"], *_QUALITY["valid"]), 0.0)
            valid = {"valid_auc": auc - 0.1, "valid_logloss": 1.1 - auc}
            rows.append(
                {**row, "model": model, "seed": seed, "chosen": auc != 0.1, "auc": auc, "logloss": 1 - auc, **valid}
            )
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_differences_count_in_deviations_of_flat(tmp_path: Path) -> None:
    models = {"dcn-planted-x8": (0.5,), "dcn-flat": FLAT, "dcn-coherent-x2.5": TOWERS, "lone-random-x4": TOWERS}
    path = write_runs(tmp_path / "runs.parquet", models)
    first, second = costs(path)
    assert (first.family, first.partition, first.compression) == ("dcn", "coherent", 2.5)
    assert (second.partition, second.compression) == ("planted", 8)
    assert first.difference("auc") == pytest.approx(-0.01) and first.difference("logloss") == pytest.approx(0.01)
    assert first.in_deviations("auc") == pytest.approx(-0.01 / statistics.stdev(FLAT))
    assert costs(path, "valid")[0].towers["auc"].mean == pytest.approx(0.69)
    assert list(cost_table([first, second])) == [
        "| family | partition | compression | seeds | AUC | difference | in deviations | LogLoss | difference "
        "| in deviations |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| dcn | flat | 1 | 3 | 0.8000 ± 0.0100 | | | 0.2000 ± 0.0100 | | |",
        "| dcn | coherent | 2.5 | 3 | 0.7900 ± 0.0100 | -0.0100 | -1.0 | 0.2100 ± 0.0100 | +0.0100 | +1.0 |",
        "| dcn | planted | 8 | 1 | 0.5000 | -0.3000 | -30.0 | 0.5000 | +0.3000 | +30.0 |",
    ]


def test_one_seed_of_flat_has_no_deviation(tmp_path: Path) -> None:
    (cost,) = costs(write_runs(tmp_path / "runs.parquet", {"dcn-flat": (0.8,), "dcn-random-x4": TOWERS}))
    assert cost.in_deviations("auc") is None
    assert "| -0.0100 | unknown |" in list(cost_table([cost]))[-1]


def test_the_figure_is_written_whole_or_refused(tmp_path: Path) -> None:
    models = {f"{f}-{p}-x{c}": TOWERS for f in ("dcn", "dlrm") for p in ("random", "planted") for c in (2, 4)}
    found = costs(write_runs(tmp_path / "runs.parquet", {"dcn-flat": FLAT, "dlrm-flat": (0.8,), **models}))
    plot_costs(found, tmp_path / "made/towers.png")
    plot_costs(found, tmp_path / "made/towers.svg")
    assert (tmp_path / "made/towers.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "made/towers.svg").read_text().startswith("<svg")
    with pytest.raises(UserError, match=r"--plot .*towers.pdf: expected a name that ends in .png or .svg"):
        plot_costs(found, tmp_path / "towers.pdf")


def test_a_study_without_pairs_is_one_line(tmp_path: Path) -> None:
    path = write_runs(tmp_path / "runs.parquet", {"dcn-64": FLAT, "dcn-random-x4": TOWERS})
    with pytest.raises(UserError, match=r"no family has both .*; there are dcn-64, dcn-random-x4"):
        costs(path)
    with pytest.raises(UserError, match=r"expected the runs.parquet of a sweep"):
        costs(tmp_path / "runs.csv")
