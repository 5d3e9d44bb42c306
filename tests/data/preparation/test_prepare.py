import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarec.data.preparation import text_files
from megarec.data.preparation.prepare import prepare_table
from megarec.data.schema import load_schema
from megarec.data.store import open_split
from megarec.errors import UserError

SPEC: dict[str, Any] = {
    "name": "shop",
    "columns": {
        "user": {"type": "categorical", "min_count": 2},
        "item": {"type": "categorical", "dtype": "integer"},
        "site": {"type": "categorical", "hash": 1000},
        "bought": {"type": "multi_valued", "dtype": "integer", "table": "item", "pooling": "mean"},
        "tags": {"type": "multi_valued"},
        "price": {"type": "numeric", "log": True},
        "age": {"type": "numeric", "missing": -1},
        "note": {"type": "ignored"},
        "clicked": {"type": "label"},
    },
}
TRAIN = """\
user,item,site,bought,tags,price,age,note,clicked
ann,7,apple,,red|blue,0,30,x,1
bob,9,äpfel,7,,-1.5,,"a, b",0
ann,7,,9|7|12,red||red,1e3,5.5,,0
"""
TEST = """\
user,item,site,bought,tags,price,age,note,clicked
bob,12,apple,7|99,green|red,2,1,,1
ann,,"",,red,3,2,,0
"""
# By hand. user: ann twice -> 1, bob once < min_count -> 0. item: 7 twice -> 1, 9 -> 2, 12 only in bought -> 0.
# tags: red 3 times -> 1, blue -> 2. site: hashes checked in test_vocabulary.py against b2sum.
EXPECTED = {
    "train": {
        "user": [1, 0, 1],
        "item": [1, 2, 1],
        "site": [28, 926, 0],
        "bought": [[], [1], [2, 1, 0]],
        "tags": [[1, 2], [], [1, 1]],
        "price": np.float32([0, -np.log(2.5), np.log(1001)]).tolist(),
        "age": [30, -1, 5.5],
        "clicked": [1, 0, 0],
    },
    "test": {
        "user": [0, 1],
        "item": [0, 0],
        "site": [28, 0],
        "bought": [[1, 0], []],
        "tags": [[0, 1], [1]],
        "price": np.float32(np.log([3, 4])).tolist(),
        "age": [1, 2],
        "clicked": [1, 0],
    },
}


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_tsv(path: Path, text: str) -> Path:
    path = path.with_suffix(".tsv")
    path.write_text(text.replace('"a, b"', "a; b").replace('""', "").replace(",", "\t"), encoding="utf-8")
    return path


def write_parquet(path: Path, text: str) -> Path:
    """With the types that pandas or Spark would write: integers with gaps as floats, lists, dictionaries."""
    lines = [line.replace('"a, b"', "a; b").replace('""', "").split(",") for line in text.splitlines()]
    columns = dict(zip(lines[0], map(list, zip(*lines[1:], strict=True)), strict=True))

    def numbers(name: str) -> list[float | None]:
        return [float(v) if v else None for v in columns[name]]

    table = pa.table(
        {
            "user": pa.array(columns["user"]).dictionary_encode(),
            "item": pa.array([float("nan") if v is None else v for v in numbers("item")], pa.float64()),
            "site": pa.array([v or None for v in columns["site"]], pa.large_string()),
            "bought": pa.array(
                [[int(x) for x in v.split("|") if x] if v else None for v in columns["bought"]], pa.list_(pa.int32())
            ),
            "tags": pa.array([v.split("|") for v in columns["tags"]], pa.large_list(pa.string())),
            "price": pa.array(numbers("price"), pa.float64()),
            "age": pa.array(numbers("age"), pa.float32()),
            "note": pa.array(columns["note"]),
            "clicked": pa.array([v == "1" for v in columns["clicked"]]),
        }
    )
    path = path.with_suffix(".parquet")
    pq.write_table(table, path)
    return path


def write_spec(directory: Path, spec: dict[str, Any] = SPEC) -> Path:
    path = directory / "spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def all_splits(path: Path) -> dict[str, list[Path]]:
    return {split: [path] for split in ("train", "valid", "test")}


def changed(column: str, **keys: Any) -> dict[str, Any]:
    return SPEC | {"columns": SPEC["columns"] | {column: keys}}


def prepare(directory: Path, train: str = TRAIN, test: str = TEST, spec: dict[str, Any] = SPEC) -> Path:
    """CSV in, prepared data set out."""
    files = {
        split: [write_csv(directory / f"{split}.csv", text)]
        for split, text in (("train", train), ("valid", test), ("test", test))
    }
    prepare_table(write_spec(directory, spec), files, directory / "out")
    return directory / "out"


@pytest.mark.parametrize("write", [write_csv, write_tsv, write_parquet])
def test_every_format_gives_the_same_by_hand(tmp_path: Path, write: Any) -> None:
    train, test = write(tmp_path / "train.csv", TRAIN), write(tmp_path / "test.csv", TEST)
    schema = prepare_table(write_spec(tmp_path), {"train": [train], "valid": [test], "test": [test]}, tmp_path / "out")
    for split, expected in EXPECTED.items():
        assert pq.read_table(tmp_path / "out" / split / "000.parquet").to_pydict() == expected
    assert schema == load_schema(tmp_path / "out")
    assert {f.name: (f.rows, f.multi_valued, f.pooling, f.table) for f in schema.categorical} == {
        "user": (2, False, "sum", None),
        "item": (3, False, "sum", None),
        "site": (1000, False, "sum", None),
        "bought": (3, True, "mean", "item"),
        "tags": (3, True, "sum", None),
    }
    assert schema.numeric == ("price", "age") and schema.label == "clicked"
    assert schema.rows == {"train": 3, "valid": 2, "test": 2}
    assert sorted(p.stem for p in (tmp_path / "out" / "vocabulary").iterdir()) == ["item", "tags", "user"]


def test_what_it_writes_can_be_opened(tmp_path: Path) -> None:
    out = prepare(tmp_path)
    store = open_split(out, "test", load_schema(out), "error")
    _, ids, labels = store.gather(np.array([1, 0]))
    assert ids["tags"].values.tolist() == [1, 0, 1] and labels.tolist() == [0, 1]


def test_streaming_in_small_blocks_and_several_files_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, body = TRAIN.split("\n", 1)
    body = body.replace('"a, b"', "b") * 50
    whole = prepare(tmp_path, f"{header}\n{body}")
    (tmp_path / "again").mkdir()
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 128)
    lines = body.splitlines()
    files = [
        write_csv(tmp_path / f"part{i}.csv", "\n".join([header, *lines[start : start + 50]]))
        for i, start in enumerate((0, 50, 100))
    ]
    test = [tmp_path / "test.csv"]
    prepare_table(tmp_path / "spec.json", {"train": files, "valid": test, "test": test}, tmp_path / "again")
    for split in ("train", "test"):
        tables = [pq.read_table(out / split) for out in (whole, tmp_path / "again")]
        assert tables[0].equals(tables[1]) and len(tables[0]) > 1


def test_without_a_header(tmp_path: Path) -> None:
    out = prepare(tmp_path, TRAIN.split("\n", 1)[1], TEST.split("\n", 1)[1], SPEC | {"header": False})
    assert pq.read_table(out / "train").to_pydict() == EXPECTED["train"]


def test_text_that_looks_like_a_null_is_a_category(tmp_path: Path) -> None:
    spec = {"name": "x", "columns": {"country": {"type": "categorical"}, "y": {"type": "label"}}}
    out = prepare(tmp_path, "country,y\nNA,1\nnull,0\n,1\n", "country,y\nNA,0\n", spec)
    assert pq.read_table(out / "train")["country"].to_pylist() == [1, 2, 0]


def line(**changes: str) -> str:
    row = {"user": "ann", "item": "7", "site": "apple", "bought": "7", "tags": "red", "price": "1", "age": "2"}
    return ",".join((row | {"note": "", "clicked": "1"} | changes).values()) + "\n"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"price": ""}, r"price=None, expected a number \(or columns\.price\.missing in the spec, to fill in\)"),
        ({"price": "nan"}, r"price='nan', expected a number \(or columns\.price\.missing"),
        ({"price": "cheap"}, r"price='cheap', expected a number"),
        ({"age": "inf"}, r"age='inf', expected a finite number"),
        ({"age": "1e39"}, r"age='1e39', expected a finite number"),
        ({"item": "7.5"}, r"item='7\.5', expected an integer"),
        ({"bought": "9|x|7"}, r"bought='x', expected an integer"),
        ({"clicked": "2"}, r"clicked='2', expected 0 or 1"),
        ({"clicked": "yes"}, r"clicked='yes', expected 0 or 1"),
        ({"clicked": ""}, r"clicked=None, expected 0 or 1"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_bad_row_is_named(tmp_path: Path, split: str, bad: dict[str, str], message: str) -> None:
    header = TRAIN.split("\n", 1)[0] + "\n"
    broken = header + line() * 37 + line(**bad) + line() * 20
    texts = {"train": header + line() * 3, "test": header + line()} | {split: broken}
    file = "valid" if split == "test" else split  # prepare() gives valid and test the same text; valid comes first
    with pytest.raises(UserError, match=rf"{file}\.csv: row 37 \(from 0, header not counted\): {message}"):
        prepare(tmp_path, **texts)
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["spec.json", "test.csv", "train.csv", "valid.csv"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("", r"train\.csv: is empty; expected a line of names"),
        (TRAIN.split("\n")[0] + "\n", r"train\.csv: no rows; every split needs some"),
        (
            TRAIN.replace("price", "prise", 1),
            r"train\.csv: column 'prise' is not declared; did you mean 'price'\? .*'ignored'",
        ),
        (TRAIN.replace(",clicked\n", "\n", 1), r"train\.csv: column 'clicked' is missing"),
        (TRAIN + "1," * 11 + "\n", r"train\.csv: row 3 \(from 0, .*\): 12 values \('1,1,.*'\), expected 9"),
        (TRAIN.replace("note", "user", 1), r"train\.csv: column 'user' appears 2 times"),
        (
            TRAIN + "too,short\n",
            r"train\.csv: row 3 \(from 0, header not counted\): 2 values \('too,short'\), expected 9",
        ),
    ],
)
def test_a_file_that_does_not_fit(tmp_path: Path, train: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, train)


def test_a_missing_column(tmp_path: Path) -> None:
    spec = SPEC | {"columns": SPEC["columns"] | {"sites": {"type": "categorical"}}}
    with pytest.raises(UserError, match=r"train\.csv: column 'sites' is missing; did you mean 'site'\?"):
        prepare(tmp_path, spec=spec)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.dat", b"", r"train\.dat: suffix '\.dat', expected \.csv, \.tsv, \.txt, \.jsonl"),
        ("none.csv", None, r"none\.csv: no such file"),
        ("none.parquet", None, r"none\.parquet: no such file"),
        ("train.parquet", b"not parquet", r"train\.parquet: cannot be read: "),
        (
            "train.csv",
            TRAIN.encode("latin-1"),
            r"train\.csv: row 1 \(from 0.*\): site=b'\\xe4pfel', expected UTF-8; state the \"encoding\"",
        ),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare_table(write_spec(tmp_path), all_splits(tmp_path / name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user", pa.array([1.5, 2.5]), r"row 0 \(from 0\): user=1\.5, expected an integer \(no other float"),
        ("tags", pa.array([1, 2]), r"column 'tags' is int64, expected text or a list"),
        ("price", pa.array([[1], [2]]), r"column 'price' is list<.*>, expected a number"),
        ("item", pa.array([1.0, 2.5]), r"row 1 \(from 0\): item=2\.5, expected an integer"),
    ],
)
def test_parquet_of_a_wrong_type(tmp_path: Path, column: str, values: pa.Array, message: str) -> None:
    path = write_parquet(tmp_path / "train.csv", TEST)
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, values), path)
    with pytest.raises(UserError, match=r"train\.parquet: " + message):
        prepare_table(write_spec(tmp_path), all_splits(path), tmp_path / "out")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SPEC | {"colums": {}}, "unknown key 'colums'; did you mean 'columns'?"),
        (
            changed("user", type="categorical", min_cout=2),
            "unknown key 'columns.user.min_cout'; did you mean 'min_count'?",
        ),
        (changed("user", type="categorcal"), "columns.user.type='categorcal'; did you mean 'categorical'?"),
        (changed("user", min_count=2), "columns.user.type is missing; one of: categorical, "),
        (changed("user", type="categorical", min_count="2"), "columns.user.min_count: Input should be a valid integer"),
        (
            changed("user", type="categorical", min_count=2, hash=5),
            "columns.user: min_count and hash exclude each other",
        ),
        (changed("user", type="categorical", hash=1), "columns.user.hash: Input should be greater than or equal to 2"),
        (changed("bought", type="multi_valued", table="itm"), "columns.bought.table='itm'; did you mean 'item'?"),
        (
            changed("bought", type="multi_valued", table="item"),
            "columns.bought.table='item': that column needs a table",
        ),
        (changed("clicked", type="ignored"), "expected at least one column of type 'label', found none"),
        (
            SPEC | {"columns": SPEC["columns"] | {n: {"type": "weight"} for n in ("a", "b")}},
            "expected at most one column of type 'weight', found 2: ['a', 'b']",
        ),
        ({"name": "x", "columns": {"y": {"type": "label"}}}, "expected at least one column of type 'categorical'"),
        ({"columns": SPEC["columns"]}, "name is missing"),
        ([], "holds []"),
    ],
)
def test_a_wrong_spec(tmp_path: Path, spec: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, spec=spec)
    assert str(caught.value).startswith(f"{tmp_path / 'spec.json'}: {message}")


def test_a_spec_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"spec\.json: cannot be read \(No such file or directory\)"):
        prepare_table(tmp_path / "spec.json", {}, tmp_path / "out")
    (tmp_path / "spec.json").write_text("{,")
    with pytest.raises(UserError, match=r"spec\.json:1:2: not JSON: "):
        prepare_table(tmp_path / "spec.json", {}, tmp_path / "out")


WEIGHTED: dict[str, Any] = {
    "name": "weighted",
    "columns": {
        "bought": {"type": "multi_valued", "pooling": "mean"},
        "how_often": {"type": "weights", "of": "bought"},
        "clicked": {"type": "label"},
    },
}


def weighted_files(tmp_path: Path, rows: list[str]) -> dict[str, list[Path]]:
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["bought,how_often,clicked", *rows]) + "\n", encoding="utf-8")
    return {"train": [path], "valid": [path], "test": [path]}


def prepare_weighted(tmp_path: Path, rows: list[str], spec: dict[str, Any] = WEIGHTED) -> Path:
    (tmp_path / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    prepare_table(tmp_path / "spec.json", weighted_files(tmp_path, rows), tmp_path / "out")
    return tmp_path / "out"


def test_weights_beside_a_list(tmp_path: Path) -> None:
    """An empty element goes with its weight; rows of any order come with their own weights."""
    path = prepare_weighted(tmp_path, ["a|b,0.5|2,1", ",,0", "b||a,3|9|-1e-3,1"])
    schema = load_schema(path)
    (feature,) = schema.categorical
    assert (feature.weighted, feature.multi_valued, feature.mean_length) == (True, True, 1.333)
    _, ids, _ = open_split(path, "train", schema, "error").gather(np.array([2, 1, 0]))
    assert ids["bought"].lengths is not None and ids["bought"].weights is not None
    assert ids["bought"].lengths.tolist() == [2, 0, 2]
    assert ids["bought"].weights.tolist() == np.float32([3, -1e-3, 0.5, 2]).tolist()
    a, b = ids["bought"].values[2:].tolist()
    assert ids["bought"].values.tolist() == [b, a, a, b]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a|b,0.5,1", r"row 1 .*: how_often='0.5', expected 2 weights, one for each value of 'bought'"),
        ("a|b,0.5|x,1", r"row 1 .*: how_often='x', expected numbers"),
        ("a|b,0.5|inf,1", r"row 1 .*: how_often='inf', expected finite numbers"),
        ("a|b,0.5|,1", r"row 1 .*: how_often=''"),
    ],
)
def test_bad_weights(tmp_path: Path, row: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        prepare_weighted(tmp_path, ["a,1,1", row])


def test_weights_of_what_is_no_list(tmp_path: Path) -> None:
    columns = {**WEIGHTED["columns"], "how_often": {"type": "weights", "of": "boght"}}
    with pytest.raises(
        UserError, match=r"columns.how_often.of='boght' is not a multi_valued or sequence column; did you mean 'bought'"
    ):
        prepare_weighted(tmp_path, ["a,1,1"], {**WEIGHTED, "columns": columns})


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([[1.0], [2.0, 3.0]], "as many weights as bought has ids"),
        ([[1.0], [float("nan")]], "finite numbers"),
        ([[1.0], None], "present"),
    ],
)
def test_bad_weights_of_a_prepared_shard(tmp_path: Path, weights: list[Any], expected: str) -> None:
    path = prepare_weighted(tmp_path, ["a,1,1", "b,2,0"])
    (shard,) = (path / "train").glob("*.parquet")
    rows = pq.read_table(shard)
    index = rows.column_names.index("bought:weights")
    changed = pa.array(weights, pa.list_(pa.float32()))
    pq.write_table(rows.set_column(index, "bought:weights", changed), shard)
    with pytest.raises(UserError, match=f"row 1 .from 0.: bought:weights=.*, expected {expected}"):
        open_split(path, "train", load_schema(path), "error")
    assert open_split(path, "train", load_schema(path), "skip").skipped == {f"bought:weights is not {expected}": 1}


def test_a_shard_without_weights_is_refused(tmp_path: Path) -> None:
    path = prepare_weighted(tmp_path, ["a,1,1"])
    (shard,) = (path / "train").glob("*.parquet")
    pq.write_table(pq.read_table(shard).drop_columns(["bought:weights"]), shard)
    with pytest.raises(UserError, match="column 'bought:weights' is missing"):
        open_split(path, "train", load_schema(path), "error")
