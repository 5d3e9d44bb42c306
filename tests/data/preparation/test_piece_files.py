"""Mapped files of a preparation: their pages are given back, and what is read afterwards is what was written."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa

from megarec.data.preparation.piece_files import Mapped, Runs, one_row, save


def _mapped_kib(path: Path) -> int:
    """Pages of a file that count as memory of this process."""
    text = Path("/proc/self/smaps").read_text()
    found = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", text)
    return sum(map(int, found))


def test_pages_are_given_back_and_read_again(tmp_path: Path) -> None:
    numbers = np.arange(1 << 18)
    path = tmp_path / "words.arrow"
    size = save(path, {"a": one_row(pa.array(numbers)), "b": one_row(pa.array(["x", "y"]))})
    assert path.stat().st_size == size and not list(tmp_path.glob("*.partial"))
    file = Mapped(path)
    [batch] = file.batches
    values = batch.column("a").flatten().to_numpy()
    for _ in range(2):
        assert values.sum() == numbers.sum()
        assert _mapped_kib(path) >= 1 << 11
        file.release()
        assert _mapped_kib(path) <= 64
    assert batch.column("b").flatten().to_pylist() == ["x", "y"]


def test_runs_have_a_record_batch_each(tmp_path: Path) -> None:
    path = tmp_path / "000000.arrow"
    with Runs(path, pa.int64(), "row") as runs:
        for start in (0, 3):
            runs.write(pa.array([start, start + 1]), np.array([1, 2]))
        runs.write(pa.array([], pa.int64()), np.zeros(0, np.int64))
    file = Mapped(path)
    file.release()
    assert [batch.to_pydict() for batch in file.batches] == [
        {"value": [0, 1], "row": [1, 2]},
        {"value": [3, 4], "row": [1, 2]},
    ]
