"""The benchmark of preparation, so small that it measures nothing."""

from pathlib import Path

import pytest

from tools.benchmarks import prepare


def test_rows_and_memory_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "DAY", 300)
    monkeypatch.setenv("MEGAREC_BENCH_ROWS", "300")
    (row,) = prepare.run()["rows"]
    assert row["rows"] == 300 and 200 < row["bytes_per_row"] < 300
    assert row["rows_per_second"] > 0 and row["memory_mib"] > 10
    assert not (tmp_path / ".cache" / "prepare-benchmark").exists()
