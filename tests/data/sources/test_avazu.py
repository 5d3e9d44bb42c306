"""Avazu's files against the standard library: every column, hour and weekday, and one file split by chance."""

import csv
import datetime
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megarec.commands.prepare_data import main
from megarec.data.schema import load_schema
from megarec.data.sources.avazu import DEVICES, INTEGERS, NAMES, TEXTS, avazu_spec, write_made_up


def test_avazu_like_counting_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_made_up(tmp_path / "train.csv", 1000, 1, most_values=60)
    write_made_up(tmp_path / "rest.csv", 300, 2, most_values=60)
    assert (tmp_path / "rest.csv").read_text().splitlines()[0] == ",".join(NAMES)
    rest = [f"--{split}={tmp_path / 'rest.csv'}" for split in ("valid", "test")]
    words = ["prepare", "avazu", f"--output={tmp_path / 'out'}", f"--train={tmp_path / 'train.csv'}", *rest]
    monkeypatch.setattr(sys, "argv", [*words, "--min-count", "2"])
    main()
    schema = load_schema(tmp_path / "out")
    assert schema.rows == {"train": 1000, "valid": 300, "test": 300} and not schema.numeric
    assert len(schema.categorical) == 23 == len(INTEGERS + TEXTS + DEVICES) + 2
    rows = {name: list(csv.DictReader((tmp_path / f"{name}.csv").open(newline=""))) for name in ("train", "rest")}
    found = pq.read_table(tmp_path / "out" / "test").to_pydict()
    assert found["click"] == [int(row["click"]) for row in rows["rest"]]
    for name in INTEGERS + TEXTS + DEVICES:
        base = 10 if name in INTEGERS else 16
        counts = Counter(int(row[name], base) for row in rows["train"])
        kept = sorted((-count, value) for value, count in counts.items() if count >= 2)
        row_of = {value: row for row, (_, value) in enumerate(kept, start=1)}
        assert found[name] == [row_of.get(int(row[name], base), 0) for row in rows["rest"]], name
    for part, of in (("hour", lambda at: at.hour), ("weekday", lambda at: at.weekday())):
        moments = [datetime.datetime.strptime(row["hour"], "%y%m%d%H") for row in rows["rest"]]
        words_of = pq.read_table(tmp_path / "out" / "vocabulary" / f"hour_{part}.parquet")["value"].to_pylist()
        assert [words_of[row - 1] for row in found[f"hour_{part}"]] == [of(at) for at in moments]


def test_hashed() -> None:
    spec = avazu_spec("a", rows=50)
    assert {column.hash for name, column in spec.ids.items()} == {50} and "id" not in spec.ids
