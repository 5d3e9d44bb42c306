"""One input divided by time or by a column, and the columns that are no features; bytes equal for any workers."""

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarec.commands.prepare_data import main
from megarec.data.preparation import merge, scan, splits, table_reader, text_files
from megarec.data.preparation.encode_rows import RowEncoder
from megarec.data.preparation.prepare import MaxBad, prepare_as, prepare_table
from megarec.data.preparation.splits import ByColumn, ByTime, Division, Shares
from megarec.data.preparation.table_reader import Part
from megarec.data.schema import Schema, load_schema, select_label
from megarec.data.sources.synthetic import prepare_like
from megarec.data.store import open_split
from megarec.errors import UserError
from megarec.evaluation.opened import fitting_schema
from tests.data.preparation.test_preparation import content, killed_at
from tests.data.preparation.test_prepare import all_splits, write_spec

COLUMNS: dict[str, Any] = {
    "when": {"type": "time"},
    "user": {"type": "categorical"},
    "price": {"type": "bucketised", "buckets": 3},
    "size": {"type": "numeric", "standardise": True},
    "click": {"type": "label"},
    "buy": {"type": "label"},
    "counts": {"type": "weight"},
    "session": {"type": "group"},
    "part": {"type": "split", "values": {"tr": "train", "1": "valid", "te": "test"}},
}
SPEC = {"name": "log", "columns": COLUMNS}
FRACTIONS = (0.6, 0.3, 0.1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_reader, "UNIT_BYTES", 1000)
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 700)
    monkeypatch.setattr(scan, "PIECE_ROWS", 20)
    monkeypatch.setattr(splits, "_RUN_ROWS", 16)
    monkeypatch.setattr(merge, "MERGE_VALUES", 10)


def made(seed: int, rows: int = 80) -> list[dict[str, str]]:
    chance = random.Random(seed)
    return [
        {
            "when": str(chance.choice([chance.randint(0, 60), 30, 30, chance.uniform(0, 60)])),
            "user": chance.choice("abc"),
            "price": f"{chance.random():.2f}",
            "size": f"{chance.gauss(0, 3):.2f}",
            "click": str(chance.randint(0, 1)),
            "buy": str(chance.randint(0, 1)),
            "counts": chance.choice(["0", "1", "2.5"]),
            "session": chance.choice(["s1", "s2", "7.0", "7"]),
            "part": chance.choice(["tr", "tr", "1", "1.0", "te"]),
        }
        for _ in range(rows)
    ]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]) + "\n")
    return path


def prepared(tmp_path: Path, parts: list[list[dict[str, str]]], shares: Division, workers: int = 1) -> Path:
    paths = [write(tmp_path / f"{number}.csv", rows) for number, rows in enumerate(parts)]
    out = tmp_path / f"out{workers}"
    prepare_table(write_spec(tmp_path, SPEC), {"all": paths}, out, workers=workers, shares=shares)
    return out


@pytest.mark.usefixtures("small")
def test_by_time_against_a_sort(tmp_path: Path) -> None:
    parts = [made(seed) for seed in range(4)]
    outs = [prepared(tmp_path, parts, ByTime(FRACTIONS), workers) for workers in (1, 2, 4)]
    assert content(outs[0]) == content(outs[1]) == content(outs[2])
    times = sorted(float(row["when"]) for rows in parts for row in rows)
    first = {split: times[round(share * len(times))] for split, share in (("valid", 0.6), ("test", 0.9))}

    def split_of(row: dict[str, str]) -> str:  # a time goes where its first row falls
        earlier = sum(time < float(row["when"]) for time in times)
        return "train" if earlier < 0.6 * len(times) else "valid" if earlier < round(0.9 * len(times), 6) else "test"

    expected: dict[str, list[float]] = {"train": [], "valid": [], "test": []}
    for rows in parts:
        for row in rows:
            expected[split_of(row)].append(float(row["when"]))
    found = {split: pq.read_table(outs[0] / split)["when"].to_pylist() for split in expected}
    assert found == expected
    assert max(found["train"]) < min(found["valid"]) <= max(found["valid"]) < min(found["test"])
    assert first["valid"] in (*found["train"], min(found["valid"])) and load_schema(outs[0]).time == "when"


def test_chance_places_rows_as_ever() -> None:
    part = Part(Path("a"), pa.RecordBatch.from_pydict({}), np.arange(40))
    assert "".join(map(str, Shares((0.5, 0.3, 0.2), 7).places(3, part))) == "0020002200002000201020001012000100221112"


@pytest.mark.usefixtures("small")
def test_killed_between_the_passes_it_goes_on(tmp_path: Path) -> None:
    parts = [made(seed, 40) for seed in range(3)]
    whole = content(prepared(tmp_path, parts, ByTime(FRACTIONS)))

    def again() -> None:
        files = {"all": [tmp_path / f"{number}.csv" for number in range(3)]}
        prepare_table(tmp_path / "spec.json", files, tmp_path / "again", shares=ByTime(FRACTIONS))

    kills = 0
    while kills < 50 and killed_at(12, again):
        kills += 1
    assert 2 <= kills < 50 and content(tmp_path / "again") == whole


@pytest.mark.usefixtures("small")
def test_by_column_with_all_roles(tmp_path: Path) -> None:
    parts = [made(seed) for seed in range(3)]
    outs = [prepared(tmp_path, parts, ByColumn(), workers) for workers in (1, 2, 4)]
    assert content(outs[0]) == content(outs[1]) == content(outs[2])
    rows = [row for some in parts for row in some]
    schema = load_schema(outs[0])
    assert (schema.label, schema.labels) == ("click", ("click", "buy"))
    assert (schema.weight, schema.group, schema.time) == ("counts", "session", "when")
    assert {f.name for f in schema.categorical} | set(schema.numeric) == {"user", "price", "size"}
    groups: dict[str, int] = {}
    for split, says in (("train", ["tr"]), ("valid", ["1", "1.0"]), ("test", ["te"])):
        raw = [row for row in rows if row["part"] in says]
        table = pq.read_table(outs[0] / split)
        found = table.to_pydict()
        assert "part" not in found
        for name in ("click", "buy", "counts", "when"):
            assert found[name] == [float(row[name]) for row in raw]
        for row, group in zip(raw, found["session"], strict=True):
            assert groups.setdefault(row["session"].removesuffix(".0"), group) == group
        assert table.schema.field("session").type == pa.int64() and table.schema.field("counts").type == pa.float32()
        encoded = RowEncoder(outs[0]).encode([{name: row[name] for name in ("user", "price", "size")} for row in raw])
        assert encoded.equals(table.select(["user", "price", "size"])) and RowEncoder(outs[0]).encode(raw) == encoded
    assert len(set(groups.values())) == 3
    for label in ("click", "buy"):
        chosen = select_label(schema, label)
        _, _, labels = open_split(outs[0], "test", chosen, "error").gather(np.arange(schema.rows["test"]))
        assert labels.tolist() == found[label]
        assert fitting_schema(chosen, schema, Path("schema.json")).label == label
    with pytest.raises(UserError, match=r"data\.label='bye', which log does not have; did you mean 'buy'"):
        select_label(schema, "bye")
    assert select_label(Schema(name="n", label="y", categorical=(), rows={}), "y").label == "y"
    like = prepare_like(schema, tmp_path / "made up", examples=20, seed=1)
    assert (like.labels, like.weight, like.labelled) == ((), None, True)
    assert len(open_split(tmp_path / "made up", "train", like, "error")) == 16


def test_more_files_may_lack_what_is_no_feature(tmp_path: Path) -> None:
    out = prepared(tmp_path, [made(1)], ByColumn())
    rows = [{name: row[name] for name in ("user", "price", "size", "session")} for row in made(2, 9)]
    schema = prepare_as(out, {"test": [write(tmp_path / "new.csv", rows)]}, tmp_path / "new")
    assert (schema.labelled, schema.weight, schema.group, schema.time) == (False, None, "session", None)
    assert pq.read_table(tmp_path / "new" / "test").column_names == ["user", "price", "size", "session"]
    one = [{name: value for name, value in row.items() if name != "buy"} for row in made(2, 9)]
    with pytest.raises(UserError, match=r"one\.csv: column 'buy' is missing"):
        prepare_as(out, {"test": [write(tmp_path / "one.csv", one)]}, tmp_path / "other")
    with pytest.raises(UserError, match=r"new\.csv: column 'when' is missing"):
        prepare_as(out, {"all": [tmp_path / "new.csv"]}, tmp_path / "other", shares=ByTime(FRACTIONS))
    again = prepare_as(out, {"all": [tmp_path / "0.csv"]}, tmp_path / "again", shares=ByColumn())
    assert again.identity == load_schema(out).identity
    for split in ("train", "valid", "test"):
        assert pq.read_table(tmp_path / "again" / split).equals(pq.read_table(out / split))


@pytest.mark.parametrize(
    ("changes", "shares", "message"),
    [
        ({"part": "x"}, ByColumn(), r"row 3 \(.*\): part='x', expected one of 'tr', '1', 'te'"),
        ({"part": ""}, ByColumn(), r"row 3 \(.*\): part=None, expected one of 'tr', '1', 'te'"),
        ({"when": "noon"}, ByTime(FRACTIONS), r"row 3 \(.*\): when='noon', expected a number, or a date or time as 20"),
        ({"when": ""}, ByTime(FRACTIONS), r"row 3 \(.*\): when=None, expected a number, or a date"),
        ({"counts": "-1"}, ByTime(FRACTIONS), r"row 3 \(.*\): counts='-1', expected a number of at least 0"),
        ({"counts": ""}, ByTime(FRACTIONS), r"row 3 \(.*\): counts=None, expected a number of at least 0"),
        ({"session": ""}, ByTime(FRACTIONS), r"row 3 \(.*\): session=None, expected the id of a group"),
        ({"buy": "2"}, ByTime(FRACTIONS), r"row 3 \(.*\): buy='2', expected 0 or 1"),
    ],
)
def test_bad_rows(tmp_path: Path, changes: dict[str, str], shares: Division, message: str) -> None:
    rows = made(1)
    rows[3] |= changes
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, [rows], shares)
    schema = prepare_table(
        tmp_path / "spec.json", {"all": [tmp_path / "0.csv"]}, tmp_path / "o", max_bad=MaxBad(1), shares=shares
    )
    assert sum(schema.rows.values()) == 79 and schema.bad_rows == {next(iter(changes)): 1}


@pytest.mark.parametrize("split", [ByColumn(), ByTime(FRACTIONS)])
def test_a_split_without_rows(tmp_path: Path, split: Division) -> None:
    rows = [row | {"part": "tr", "when": "7"} for row in made(1)]
    message = "too few times differ" if isinstance(split, ByTime) else "'part' never names it"
    with pytest.raises(UserError, match=rf"0\.csv: no rows; every split needs some and valid got none: {message}"):
        prepared(tmp_path, [rows], split)


TEXTS = ["2020-01-31", "2020-01-31 12:30:00", "2020-01-31T12:30:00.5Z", "2020-01-31T12:30:00+01:00", "-1.5e1", ".5"]
SECONDS = [1580428800.0, 1580473800.0, 1580473800.5, 1580470200.0, -15.0, 0.5]


def test_times_of_every_kind(tmp_path: Path) -> None:
    spec = {"name": "t", "columns": {n: COLUMNS[n] for n in ("when", "size", "click")}}
    (tmp_path / "a.csv").write_text("when,size,click\n" + "".join(f"{text},1,0\n" for text in TEXTS))
    prepare_table(write_spec(tmp_path, spec), all_splits(tmp_path / "a.csv"), tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "train")["when"].to_pylist() == SECONDS
    moments = pa.array([1580473800_500], pa.timestamp("ms"))
    for values, expected in (
        (moments, 1580473800.5),
        (moments.cast(pa.timestamp("ns", "Europe/Berlin")), 1580473800.5),
        (pa.array([18292], pa.date32()), 1580428800.0),
        (pa.array([7]), 7.0),
    ):
        pq.write_table(pa.table({"when": values, "size": [1], "click": [0]}), tmp_path / "a.parquet")
        prepare_table(tmp_path / "spec.json", all_splits(tmp_path / "a.parquet"), tmp_path / "out")
        assert pq.read_table(tmp_path / "out" / "train")["when"].to_pylist() == [expected]
    pq.write_table(pa.table({"when": pa.array([1], pa.time32("s")), "size": [1], "click": [0]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: column 'when' is time32"):
        prepare_table(tmp_path / "spec.json", all_splits(tmp_path / "a.parquet"), tmp_path / "out")


@pytest.mark.parametrize(
    ("columns", "words", "message"),
    [
        ({"part": {"type": "ignored"}}, ["--split", "column"], "names no column of type 'split'; add one, or take"),
        ({"when": {"type": "ignored"}}, ["--split", "time"], "names no column of type 'time'; add one, or take"),
        ({}, ["--split", "time", "--seed", "3"], "--split time takes no --seed; leave it out"),
        ({}, ["--split", "column", "--fractions", "0.8", "0.1", "0.1"], "--split column takes no --fractions"),
        ({"user": {"type": "time"}}, [], "expected at most one column of type 'time', found 2: ['when', 'user']"),
        ({"part": {"type": "split", "values": {"a": "dev"}}}, [], "columns.part.values.a: Input should be 'train'"),
    ],
)
def test_what_makes_no_sense(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    columns: dict[str, Any],
    words: list[str],
    message: str,
) -> None:
    spec, data = write_spec(tmp_path, {"name": "log", "columns": COLUMNS | columns}), write(tmp_path / "a.csv", made(1))
    command = ["prepare", "table", f"--schema={spec}", f"--data={data}", f"--output={tmp_path / 'out'}", *words]
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec, data = write_spec(tmp_path, SPEC), write(tmp_path / "a.csv", made(1, 200))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for how in ("time", "column", "random"):
        command = ["prepare", "table", f"--schema={spec}", f"--data={data}", f"--output={tmp_path / how}"]
        monkeypatch.setattr(sys, "argv", [*command, "--split", how])
        main()
        assert sum(load_schema(tmp_path / how).rows.values()) == 200
        kept = json.loads((tmp_path / how / "spec.json").read_text())["spec"]["columns"]["part"]
        assert kept["type"] == "split" and Counter(kept["values"].values()) == {"train": 1, "valid": 1, "test": 1}
    capsys.readouterr()
