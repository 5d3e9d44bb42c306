"""Malformed tables, specs and caches, seeded: exit 0 or 2, one line, no traceback, nothing half-written."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarec.commands.prepare_data import main
from megarec.data.cache import BUILT_FILE, ROWS_FILE
from megarec.data.schema import load_schema
from megarec.data.store import open_split

SPEC = {
    "name": "n",
    "columns": {
        "a": {"type": "categorical"},
        "b": {"type": "categorical", "dtype": "integer"},
        "l": {"type": "multi_valued"},
        "x": {"type": "numeric", "missing": 0, "standardise": True},
        "s": {"type": "sequence", "max_length": 2, "newest": "last", "table": "a"},
        "q": {"type": "bucketised", "buckets": 3},
        "w": {"type": "weight"},
        "g": {"type": "group"},
        "t": {"type": "time"},
        "y": {"type": "label"},
    },
}
TABLE = b"a,b,l,x,s,q,w,g,t,y\n" + b"".join(
    b'"u%d",%d,p|q%d,%d.5,u1|u%d|p,%d,%d,g%d,2026-01-0%d,%d\n' % (*[i] * 8, i + 1, i % 2) for i in range(6)
)
# A warning that an error was lost in a callback is a fault as well.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
PIECES = [b'"', b"\n", b"\r", b",", b"\t", b"\0", b"\xff", b"7.0", b"nan", b"", b"|", b"\xef\xbb\xbf", b"1e999", b"'"]


def broken(data: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.randint(1, 3)):
        at, length = chance.randint(0, len(data)), chance.choice([0, 0, 1, 4, len(data)])
        data = data[:at] + chance.choice(PIECES) + data[at + length :]
    return data


def prepare(work: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> int:
    words = ["prepare", "table", f"--schema={work / 'spec.json'}", f"--output={work / 'out'}"]
    monkeypatch.setattr(sys, "argv", [*words, *(f"--{split}={rows}" for split in ("train", "valid", "test"))])
    before = sorted(path.name for path in work.iterdir())
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    printed = capsys.readouterr().err
    assert code in (0, 2)
    if code == 2:
        assert printed.startswith("error: ") and printed.count("\n") == 1, printed
        assert sorted(path.name for path in work.iterdir()) == before
    return code


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], suffix: str, seed: int
) -> None:
    chance = random.Random(f"{seed}{suffix}")
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    rows, codes = tmp_path / f"t{suffix}", []
    for _ in range(10):
        if suffix == ".parquet":
            values = [chance.choice([None, 1, 7.5, "u", True, [1], ["p", None], float("nan")]) for _ in range(10)]
            columns = {name: pa.array([value] * 3) for name, value in zip(SPEC["columns"], values, strict=True)}
            pq.write_table(pa.table(columns | {"y": pa.array([0, 1, 1])}), rows)
            if chance.random() < 0.3:
                rows.write_bytes(broken(rows.read_bytes(), chance))
        else:
            text = TABLE if suffix == ".csv" else TABLE.replace(b'"', b"").replace(b",", b"\t")
            rows.write_bytes(broken(text, chance))
        codes.append(prepare(tmp_path, rows, monkeypatch, capsys))
    assert 2 in codes


@pytest.mark.parametrize("seed", range(3))
def test_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    chance = random.Random(seed)
    (tmp_path / "t.csv").write_bytes(TABLE)
    for _ in range(12):
        spec = json.loads(json.dumps(SPEC))
        name = chance.choice("ablxsqwgty")
        keys = ["type", "dtype", "hash", "table", "separator", "missing", "min_count", "z", "buckets", "boundaries"]
        key = chance.choice([*keys, "max_length", "newest", "standardise"])
        spec["columns"][name][key] = chance.choice([None, 0, -1, 7, "a", "b", "", [], {}, True, 1.5, "integer", [1, 2]])
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        prepare(tmp_path, tmp_path / "t.csv", monkeypatch, capsys)


def test_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(5)
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    (tmp_path / "t.csv").write_bytes(TABLE)
    assert prepare(tmp_path, tmp_path / "t.csv", monkeypatch, capsys) == 0
    schema = load_schema(tmp_path / "out")
    good = [part.tolist() for part in open_split(tmp_path / "out", "train", schema, "error").gather(np.arange(6))[::2]]
    for _ in range(30):
        (cache,) = (tmp_path / "out" / ".arrow").glob("train-*")
        file = cache / chance.choice([ROWS_FILE, BUILT_FILE])
        file.write_bytes(broken(file.read_bytes(), chance))
        found = open_split(tmp_path / "out", "train", schema, "error").gather(np.arange(6))[::2]
        assert [part.tolist() for part in found] == good
