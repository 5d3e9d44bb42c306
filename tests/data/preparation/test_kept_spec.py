"""A prepared data set encodes other files and single rows by itself, to the bit."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarec.commands.prepare_data import main
from megarec.data.preparation.encode_rows import RowEncoder
from megarec.data.preparation.kept_spec import load_prepared
from megarec.data.preparation.prepare import MaxBad, prepare_as, prepare_spec
from megarec.data.schema import load_schema
from megarec.data.sources.criteo import criteo_spec, write_made_up
from megarec.data.store import open_split
from megarec.errors import UserError
from megarec.evaluation.opened import fitting_schema
from tests.data.preparation.test_prepare import EXPECTED, SPEC, TEST, TRAIN, prepare, prepare_weighted, write_spec

UNLABELLED = "\n".join(line.rsplit(",", 1)[0] for line in TEST.splitlines()) + "\n"


def features(table: pa.Table, label: str = "clicked") -> pa.Table:
    return table.drop_columns([label])


def test_another_day_is_encoded_from_the_data_set_alone(tmp_path: Path) -> None:
    out = prepare(tmp_path)
    for name in ("train.csv", "valid.csv", "spec.json"):
        (tmp_path / name).unlink()
    schema = prepare_as(out, {"valid": [tmp_path / "test.csv"]}, tmp_path / "more")
    assert pq.read_table(tmp_path / "more" / "valid").to_pydict() == EXPECTED["test"]
    was = load_schema(out)
    assert (schema.identity, schema.categorical, schema.rows) == (was.identity, was.categorical, {"valid": 2})
    assert load_prepared(tmp_path / "more").kept == load_prepared(out).kept
    again = prepare_as(tmp_path / "more", {"test": [tmp_path / "test.csv"]}, tmp_path / "again")
    assert (
        again.identity == was.identity
        and (out / "spec.json").read_bytes() == (tmp_path / "again" / "spec.json").read_bytes()
    )


@pytest.mark.parametrize("header", [True, False])
def test_files_without_labels(tmp_path: Path, header: bool) -> None:
    cut = 0 if header else 1
    train, test, unlabelled = ("".join(t.splitlines(True)[cut:]) for t in (TRAIN, TEST, UNLABELLED))
    out = prepare(tmp_path, train, test, SPEC | {"header": header})
    (tmp_path / "new.csv").write_text(unlabelled, encoding="utf-8")
    schema = prepare_as(out, {"test": [tmp_path / "new.csv"]}, tmp_path / "new")
    assert not schema.labelled and schema == load_schema(tmp_path / "new")
    assert pq.read_table(tmp_path / "new" / "test").equals(features(pq.read_table(out / "test")))
    message = r"new: was prepared from files without the label column 'clicked': it can be scored; for training"
    for of in (schema, fitting_schema(load_schema(out), schema, Path("schema.json"))):
        with pytest.raises(UserError, match=message):
            open_split(tmp_path / "new", "test", of, "error")
    both = {"test": [tmp_path / "test.csv", tmp_path / "new.csv"]}
    message = r"new\.csv: column 'clicked' is missing" if header else r"new\.csv: row 0 .*: 8 values .*, expected 9"
    with pytest.raises(UserError, match=message):
        prepare_as(out, both, tmp_path / "both")
    labelled = prepare_as(tmp_path / "new", {"test": [tmp_path / "test.csv"]}, tmp_path / "labelled")
    assert labelled.labelled and pq.read_table(tmp_path / "labelled" / "test").to_pydict() == EXPECTED["test"]


def test_rows_at_hand_are_what_the_shards_have(tmp_path: Path) -> None:
    out = prepare(tmp_path)
    for text, split in ((TRAIN, "train"), (TEST, "test")):
        rows: list[dict[str, Any]] = list(csv.DictReader(text.splitlines()))
        expected = features(pq.read_table(out / split))
        assert RowEncoder(out).encode(rows).equals(expected)
        for number, row in enumerate(rows):
            assert RowEncoder(out).encode([row]).equals(expected.slice(number, 1))
    typed = {"user": "ann", "item": 7.0, "site": "apple", "bought": [7, None, 9], "tags": None, "price": 1, "age": None}
    mixed = [typed, typed | {"item": "7", "bought": "7|9", "age": "-1", "price": True, "tags": ""}]
    found = RowEncoder(out).encode(mixed).to_pylist()
    assert found[0] == found[1] and found[0]["bought"] == [1, 2] and found[0]["item"] == 1
    assert RowEncoder(out).encode([]).num_rows == 0


def test_rows_of_criteos_format_and_with_weights(tmp_path: Path) -> None:
    spec = criteo_spec("c", min_count=2)
    write_made_up(tmp_path / "day", 300, most_values=50)
    files = {split: [tmp_path / "day"] for split in ("train", "valid", "test")}
    prepare_spec(spec, "c", files, tmp_path / "criteo", None, 1, MaxBad())
    rows: list[dict[str, Any]] = [
        dict(zip(spec.columns, line.split("\t"), strict=True)) for line in (tmp_path / "day").read_text().splitlines()
    ]
    expected = features(pq.read_table(tmp_path / "criteo" / "train"), "label")
    assert RowEncoder(tmp_path / "criteo").encode(rows).equals(expected)
    (tmp_path / "w").mkdir()
    out = prepare_weighted(tmp_path / "w", ["a|b,0.5|2,1", ",,0", "b||a,3|9|-1e-3,1"])
    rows = list(csv.DictReader((tmp_path / "w" / "rows.csv").read_text().splitlines()))
    assert RowEncoder(out).encode(rows).equals(features(pq.read_table(out / "train")))


GOOD = {"user": "ann", "item": 7, "site": "apple", "bought": [7], "tags": "red", "price": 1.5, "age": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"price": None}, r"row 1: price=None, expected a number \(or columns\.price\.missing"),
        ({"item": "x"}, "row 1: item='x', expected an integer"),
        ({"prize": 1}, "row 1: column 'prize' is not declared; did you mean 'price'"),
        ({"tags": 7}, "column 'tags' is int64, expected text or a list"),
        ({"user": object()}, "row 1: user=<object .*, expected text, a number, a list or None"),
        ({"item": 1 << 70}, "row 1: item=1180591620717411303424, expected text, a number"),
    ],
)
def test_a_row_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    encoder = RowEncoder(prepare(tmp_path))
    with pytest.raises(UserError, match=message):
        encoder.encode([GOOD, GOOD | changes])
    with pytest.raises(UserError, match="row 0: column 'item' is missing"):
        encoder.encode([{name: value for name, value in GOOD.items() if name != "item"}])


def test_data_that_keep_no_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an earlier version: they still train."""
    out = prepare(tmp_path)
    (out / "spec.json").unlink()
    content = json.loads((out / "schema.json").read_text())
    del content["labelled"]
    (out / "schema.json").write_text(json.dumps(content))
    assert len(open_split(out, "train", load_schema(out), "error")) == 3
    words = [f"--output={tmp_path / 'new'}", f"--test={tmp_path / 'test.csv'}"]
    for given, message in (
        ([f"--like={out}"], f"{out} has no spec.json, so its rules are unknown: an earlier version made it"),
        ([f"--like={tmp_path}"], "schema.json does not exist"),
        ([], "expected either --schema FILE, what the columns are, or --like DIR"),
        ([f"--like={out}", f"--schema={write_spec(tmp_path)}"], "expected either --schema FILE"),
    ):
        monkeypatch.setattr("signal.signal", lambda *_: None)
        monkeypatch.setattr(sys, "argv", ["prepare", "table", *words, *given])
        with pytest.raises(SystemExit) as end:
            main()
        error = capsys.readouterr().err
        assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_damaged_spec(tmp_path: Path) -> None:
    out = prepare(tmp_path)
    content = json.loads((out / "spec.json").read_text())
    for change, message in (
        ({"spec": {**content["spec"], "colums": 1}}, "spec.json: unknown key 'colums'; did you mean 'columns'"),
        ({"version": 2}, "spec.json: version: Input should be 1; prepare the data again"),
    ):
        (out / "spec.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=message):
            load_prepared(out)
