"""The loader's benchmark on a few rows: what it compares is the same, and its keys are those of the contract."""

import pytest

from tools.benchmarks import loader


def test_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "BATCH", 16)
    monkeypatch.setattr(loader, "BYTES", 1)
    monkeypatch.setattr(loader, "REPETITIONS", 2)
    monkeypatch.setattr(
        loader, "SHAPES", {"both": loader.Shape(3, 2, 2, 5, 100), "one": loader.Shape(2, 0, 0, 0, None)}
    )
    result = loader.run()
    assert result["name"] == "loader"
    assert set(result["ratios"]) == {
        f"{name}_of_{other}" for name in ("both", "one") for other in ("take", "columns", "copy")
    }
    assert all(ratio > 0 for ratio in result["ratios"].values())
    both, one = result["rows"]
    # Two ids and a label in three words with padding, a checksum: 24 bytes; 8 of the key, 4 a number.
    assert (both["name"], one["bytes_read"], one["bytes_of_batch"]) == ("both", 24, 8 + 2 * 4 + 4)
