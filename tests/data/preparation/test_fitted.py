"""Sequences, buckets and standardised numbers, against a reference in plain Python; the same bytes for any workers."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megarec.data.preparation import merge, scan, table_reader, text_files
from megarec.data.preparation.encode_rows import RowEncoder
from megarec.data.preparation.kept_spec import load_prepared
from megarec.data.preparation.prepare import MaxBad, prepare_as, prepare_table
from megarec.data.schema import load_schema
from megarec.data.store import open_split
from megarec.errors import UserError
from tests.data.preparation.test_preparation import content
from tests.data.preparation.test_prepare import all_splits, write_spec

COLUMNS: dict[str, Any] = {
    "user": {"type": "categorical", "min_count": 2},
    "seen": {"type": "sequence", "max_length": 3, "newest": "last", "dtype": "integer", "pooling": "mean"},
    "how": {"type": "weights", "of": "seen"},
    "tags": {"type": "sequence", "max_length": 2, "newest": "first", "table": "user"},
    "age": {"type": "bucketised", "boundaries": [18, 30.5, 60]},
    "price": {"type": "bucketised", "buckets": 4},
    "height": {"type": "numeric", "standardise": True},
    "spent": {"type": "numeric", "log": True, "standardise": True, "missing": 0},
    "plain": {"type": "numeric", "missing": -1},
    "y": {"type": "label"},
}
SPEC = {"name": "all", "columns": COLUMNS}


def made(seed: int, rows: int) -> list[dict[str, str]]:
    chance = random.Random(seed)

    def listed(values: list[str]) -> str:
        return "|".join(values)

    found = []
    for _ in range(rows):
        seen = listed([chance.choice(["", str(chance.randint(1, 9))]) for _ in range(chance.randint(0, 6))])
        found.append(
            {
                "user": chance.choice("abcdefg"),
                "seen": seen,
                "how": listed([f"{chance.uniform(-2, 2):.3f}" for _ in seen.split("|")]) if seen else "",
                "tags": listed([chance.choice(["", "a", "b", "zz"]) for _ in range(chance.randint(0, 5))]),
                "age": chance.choice(["", "17.9", "18", "30.5", "59", "60", "-0", "1e6"]),
                "price": chance.choice(["", "0", "0", f"{chance.lognormvariate(1, 1):.2f}"]),
                "height": f"{chance.gauss(1700000000, 9):.3f}",
                "spent": chance.choice(["", f"{chance.gauss(0, 99):.3f}"]),
                "plain": chance.choice(["", "5"]),
                "y": str(chance.randint(0, 1)),
            }
        )
    return found


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join([",".join(COLUMNS), *(",".join(row.values()) for row in rows)]) + "\n")
    return path


def elements(row: dict[str, str], name: str, most: int, newest: str) -> list[tuple[str, float]]:
    """The kept elements with their weights."""
    weights = row["how"].split("|") if name == "seen" and row["how"] else ["0"] * 99
    values = row[name].split("|") if row[name] else []
    there = [(value, float(weight)) for value, weight in zip(values, weights, strict=False) if value]
    return there[-most:] if newest == "last" else there[:most]


def vocabulary(values: list[Any], least: int = 1) -> dict[Any, int]:
    counts = {value: values.count(value) for value in values}
    kept = sorted((-count, value) for value, count in counts.items() if count >= least)
    return {value: row for row, (_, value) in enumerate(kept, start=1)}


def logged(x: float) -> float:
    return math.copysign(float(np.log1p(abs(x))), x)


def reference(train: list[dict[str, str]], rows: list[dict[str, str]]) -> dict[str, Any]:
    """But for standardised numbers, whose figures the data set says."""
    users = vocabulary([row["user"] for row in train], 2)
    items = vocabulary([int(value) for row in train for value, _ in elements(row, "seen", 3, "last")])
    prices = sorted(float(row["price"]) for row in train if row["price"])
    quartiles = sorted({prices[k * len(prices) // 4] for k in (1, 2, 3)} - {prices[0]})

    def bucket(text: str, boundaries: list[float]) -> int:
        return 1 + sum(float(text) >= boundary for boundary in boundaries) if text else 0

    seen = [elements(row, "seen", 3, "last") for row in rows]
    return {
        "user": [users.get(row["user"], 0) for row in rows],
        "seen": [[items.get(int(value), 0) for value, _ in some] for some in seen],
        "seen:weights": [np.float32([weight for _, weight in some]).tolist() for some in seen],
        "tags": [[users.get(value, 0) for value, _ in elements(row, "tags", 2, "first")] for row in rows],
        "age": [bucket(row["age"], [18, 30.5, 60]) for row in rows],
        "price": [bucket(row["price"], quartiles) for row in rows],
        "plain": [float(row["plain"] or -1) for row in rows],
        "y": [int(row["y"]) for row in rows],
    }


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_reader, "UNIT_BYTES", 1000)
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 2000)
    monkeypatch.setattr(scan, "PIECE_ROWS", 37)
    monkeypatch.setattr(merge, "MERGE_VALUES", 20)


@pytest.mark.usefixtures("small")
def test_every_column_against_a_reference(tmp_path: Path) -> None:
    parts = [made(seed, 90) for seed in range(4)]
    paths = [write(tmp_path / f"{seed}.csv", rows) for seed, rows in enumerate(parts)]
    spec, out = write_spec(tmp_path, SPEC), tmp_path / "1"
    files = {"train": paths[:2], "valid": paths[2:3], "test": paths[3:]}
    for workers in (1, 2, 4):
        prepare_table(spec, files, tmp_path / str(workers), workers=workers)
        assert content(tmp_path / str(workers)) == content(out)
    train, moments = parts[0] + parts[1], load_prepared(out).kept.fitted.moments
    rows: dict[str, list[dict[str, str]]] = {"train": train, "valid": parts[2], "test": parts[3]}
    for split, raw in rows.items():
        table = pq.read_table(out / split)
        found = table.to_pydict()
        for name, values in reference(train, raw).items():
            assert found[name] == values, name
        for name, change in (("height", float), ("spent", lambda text: logged(float(text or 0)))):
            mean, deviation = moments[name]
            exact = np.array([(change(row[name]) - mean) / deviation for row in raw])
            assert found[name] == exact.astype(np.float32).tolist()
            there = np.array([change(row[name]) for row in train if row[name]])
            assert math.isclose(mean, there.mean(), rel_tol=1e-13)
            assert math.isclose(deviation, there.std(), rel_tol=1e-6)
        assert RowEncoder(out).encode(raw).equals(table.drop_columns(["y"]))
        prepare_as(out, {"test": files[split]}, tmp_path / f"like {split}")
        assert pq.read_table(tmp_path / f"like {split}" / "test").equals(table)
    schema = load_schema(out)
    assert schema == load_schema(tmp_path / "4") and schema.numeric == ("height", "spent", "plain")
    kinds = {f.name: (f.rows, f.multi_valued, f.newest) for f in schema.categorical}
    assert kinds["age"] == (5, False, None) and kinds["tags"][1:] == (True, "first")
    assert schema.identity["age"] == "buckets cut at [18.0, 30.5, 60.0]"
    assert schema.identity["spent"].startswith("(sign(x) log(1 + |x|) - ")
    batch = open_split(out, "test", schema, "error").gather(np.array([3]))
    assert batch[1]["age"].values.tolist() == [reference(train, parts[3])["age"][3]]


def test_numbers_that_are_all_equal_or_absent(tmp_path: Path) -> None:
    columns = {
        "x": {"type": "numeric", "standardise": True, "missing": 0},
        "z": {"type": "numeric", "standardise": True, "missing": 3},
        "b": {"type": "bucketised", "buckets": 9},
        "c": {"type": "bucketised", "buckets": 9},
        "y": {"type": "label"},
    }
    (tmp_path / "a.csv").write_text("x,z,b,c,y\n" + "0.1,,7,,1\n" * 7)
    spec = write_spec(tmp_path, {"name": "n", "columns": columns})
    schema = prepare_table(spec, all_splits(tmp_path / "a.csv"), tmp_path / "out")
    kept = load_prepared(tmp_path / "out").kept.fitted
    assert kept.moments == {"x": (0.1, 1.0), "z": (0.0, 1.0)} and kept.boundaries == {"b": [], "c": []}
    assert [feature.rows for feature in schema.categorical] == [2, 2]
    row = pq.read_table(tmp_path / "out" / "train").slice(0, 1).to_pylist()
    assert row == [{"x": 0.0, "z": 3.0, "b": 1, "c": 0, "y": 1}]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"type": "bucketised"}, "columns.age: expected either boundaries or buckets"),
        ({"type": "bucketised", "buckets": 3, "boundaries": [1]}, "columns.age: expected either boundaries or buckets"),
        ({"type": "bucketised", "boundaries": [2, 2]}, "columns.age: boundaries=[2.0, 2.0]: expected ascending"),
        ({"type": "bucketised", "boundaries": []}, "columns.age.boundaries: List should have at least 1 item"),
        ({"type": "sequence", "max_length": 3}, "columns.age.newest is missing"),
        ({"type": "sequence", "max_length": 0, "newest": "last"}, "columns.age.max_length: Input should be greater"),
        ({"type": "numeric", "standardize": True}, "unknown key 'columns.age.standardize'; did you mean 'standardise'"),
    ],
)
def test_a_wrong_column(tmp_path: Path, column: dict[str, Any], message: str) -> None:
    spec = write_spec(tmp_path, {"name": "n", "columns": COLUMNS | {"age": column}})
    with pytest.raises(UserError) as caught:
        prepare_table(spec, {}, tmp_path / "out")
    assert str(caught.value).startswith(f"{spec}: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"age": "old"}, r"row 5 \(.*\): age='old', expected a number"),
        ({"price": "inf"}, r"row 5 \(.*\): price='inf', expected a finite number"),
        ({"height": ""}, r"row 5 \(.*\): height=None, expected a number \(or columns.height.missing"),
        ({"seen": "1|2|3|4|x", "how": "1|1|1|1|1"}, r"row 5 \(.*\): seen='x', expected an integer"),
    ],
)
def test_a_bad_row(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    rows = made(1, 9)
    path = write(tmp_path / "a.csv", [*rows[:5], rows[5] | changes, *rows[6:]])
    with pytest.raises(UserError, match=message):
        prepare_table(write_spec(tmp_path, SPEC), all_splits(path), tmp_path / "out")
    schema = prepare_table(tmp_path / "spec.json", all_splits(path), tmp_path / "out", max_bad=MaxBad(3))
    assert schema.rows["train"] == 8


def test_a_number_too_far_from_the_mean(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1e-9,1\n2e-9,0\n")
    (tmp_path / "b.csv").write_text("x,y\n1e38,1\n")
    spec = {"name": "n", "columns": {"x": {"type": "numeric", "standardise": True}, "y": {"type": "label"}}}
    files = all_splits(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"column 'x': 1e\+38 is too far from the mean 1\.5e-09 of the training split"):
        prepare_table(write_spec(tmp_path, spec), files | {"test": [tmp_path / "b.csv"]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_fitted_on_others_do_not_mix(tmp_path: Path) -> None:
    identities = []
    for seed in (1, 2):
        path = write(tmp_path / f"{seed}.csv", made(seed, 30))
        identities.append(prepare_table(write_spec(tmp_path, SPEC), all_splits(path), tmp_path / str(seed)).identity)
    assert all(identities[0][name] != identities[1][name] for name in ("price", "height", "spent"))
    assert identities[0]["age"] == identities[1]["age"]
    content = json.loads((tmp_path / "1" / "spec.json").read_text())
    content["fitted"]["moments"]["height"][0] += 1
    (tmp_path / "1" / "spec.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="1 is not what was prepared: height means"):
        load_prepared(tmp_path / "1")
