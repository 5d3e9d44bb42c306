"""One table in every format is the same bytes; what JSON, encodings, null words and cut-off files mean."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarec.data.preparation import arrow_files, encode, expand, scan, table_reader, text_files
from megarec.data.preparation.encode_rows import RowEncoder
from megarec.data.preparation.prepare import MaxBad, prepare_table
from megarec.data.preparation.table_spec import load_table_spec
from megarec.data.schema import Schema, load_schema
from megarec.errors import UserError
from tests.data.preparation.test_preparation import content
from tests.data.preparation.test_prepare import all_splits, write_spec

Table = dict[str, list[Any]]
COLUMNS: dict[str, Any] = {
    "user": {"type": "categorical"},
    "item": {"type": "categorical", "dtype": "integer"},
    "C1": {"type": "categorical", "dtype": "hexadecimal", "min_count": 2},
    "tags": {"type": "multi_valued"},
    "w": {"type": "weights", "of": "tags"},
    "seen": {"type": "multi_valued", "dtype": "integer", "separator": ";", "table": "item"},
    "price": {"type": "numeric", "log": True, "missing": 0},
    "note": {"type": "ignored"},
    "y": {"type": "label"},
}
LISTS = {"tags": "|", "w": "|", "seen": ";", "l": "|"}


def made_up(rows: int, seed: int) -> Table:
    """Values that every format can express: no empty element of a list, no tab, no text that means missing."""
    chance = random.Random(seed)

    def some(make: Callable[[], Any], missing: float = 0.1) -> list[Any]:
        return [None if chance.random() < missing else make() for _ in range(rows)]

    tags = some(lambda: [chance.choice(["a", "ü b", 'c"d', "e,f", "true", "7"]) for _ in range(chance.randint(1, 4))])
    return {
        "user": some(
            lambda: chance.choice(["ann", "äpfel", 'say "hi"', "x, y", "7", "007", "\u2028", "NA", "{}", "[1]"])
        ),
        "item": some(lambda: chance.choice([-5, 0, 7, 2**53 + 1, 2**63 - 1, chance.randint(0, 50)])),
        "C1": some(lambda: f"{chance.randint(0, 40):08x}"),
        "tags": tags,
        "w": [None if t is None else [round(chance.uniform(-2, 2), 3) for _ in t] for t in tags],
        "seen": some(lambda: [chance.randint(0, 50) for _ in range(chance.randint(1, 3))]),
        "price": some(lambda: chance.choice([chance.uniform(-1e4, 1e4), chance.randint(0, 9) * 1.0, 1e-7, 0.1 + 0.2])),
        "note": ["n"] * rows,
        "y": [chance.randint(0, 1) for _ in range(rows)],
    }


def as_text(table: Table, delimiter: str) -> bytes:
    """CSV by the standard library; of tabs, without any quoting."""
    cells = {
        name: ["" if v is None else LISTS[name].join(map(str, v)) if isinstance(v, list) else str(v) for v in values]
        for name, values in table.items()
    }
    rows = [list(cells), *zip(*cells.values(), strict=True)]
    if delimiter == "\t":
        return "".join("\t".join(row) + "\n" for row in rows).encode()
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return file.getvalue().encode()


def as_json(table: Table) -> bytes:
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    return "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()


def as_arrow(table: Table) -> pa.Table:
    return pa.table({name: pa.array(values) for name, values in table.items()})


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def write(path: Path, table: Table) -> Path:
    """A table in the format that the name says."""
    name = path.name
    if ".parquet" in name:
        pq.write_table(as_arrow(table), path, row_group_size=97)
    elif ".arrow" in name or ".feather" in name:
        rows = as_arrow(table)
        new = pa.ipc.new_stream if "stream" in name else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, new(file, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=61)
    else:
        delimiter = "\t" if ".tsv" in name or ".txt" in name else ","
        data = as_json(table) if ".json" in name.lower() or ".ndjson" in name else as_text(table, delimiter)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else zstd(data) if name.endswith(".zst") else data)
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds so low that a few hundred rows are several units, blocks, pieces and shards."""
    monkeypatch.setattr(table_reader, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(table_reader, "UNIT_ROWS", 200)
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 7_000)
    monkeypatch.setattr(arrow_files, "BATCH_ROWS", 50)
    monkeypatch.setattr(scan, "PIECE_ROWS", 100)
    monkeypatch.setattr(encode, "ROWS_PER_SHARD", 300)
    monkeypatch.setattr(encode, "ROWS_PER_GROUP", 64)


FORMATS = [
    *("t.csv", "t.tsv", "t.txt", "t.csv.gz", "t.tsv.zst", "t.jsonl", "t.ndjson.gz", "t.JSON.zst"),
    *("t.parquet", "t.arrow", "t.feather", "t.stream.arrow"),
]


@pytest.mark.usefixtures("small")
def test_one_table_is_the_same_bytes_in_every_format(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, {"name": "n", "columns": COLUMNS})
    tables = {split: made_up(rows, rows) for split, rows in (("train", 500), ("test", 50))}
    found = {}
    for number, name in enumerate(FORMATS):
        for split, table in tables.items():
            (tmp_path / f"{number}-{split}").mkdir()
            write(tmp_path / f"{number}-{split}" / name, table)
        train, test = ([tmp_path / f"{number}-{split}" / name] for split in tables)
        files = {"train": train, "valid": test, "test": test}
        out = tmp_path / f"out-{number}"
        prepare_table(spec, files, out, workers=1 if number % 4 else 2)
        found[name] = content(out)
    assert len(found["t.csv"]) == 2 + 4 + 2 + 1 + 1 and load_schema(tmp_path / "out-0").rows["train"] == 500
    assert [name for name in FORMATS if found[name] != found["t.csv"]] == []


def test_row_groups_are_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever pieces they are made: pages of parquet end where chunks do."""
    monkeypatch.setattr(encode, "ROWS_PER_GROUP", 10)
    rows = pa.table({"l": [[i] * (i % 3) for i in range(34)]})
    for cuts in ([3, 9, 22], [10, 20, 30]):
        parts = [rows.slice(start, end - start) for start, end in zip([0, *cuts], [*cuts, 34], strict=True)]
        groups = list(encode._groups(iter(parts)))
        assert [(len(g), g.column("l").num_chunks) for g in groups] == [(10, 1), (10, 1), (10, 1), (4, 1)]
        assert pa.concat_tables(groups).equals(rows)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["t.jsonl", "t.arrow", "t.tsv"])
def test_units_of_a_format_and_any_number_of_workers(tmp_path: Path, name: str) -> None:
    spec = write_spec(tmp_path, {"name": "n", "columns": COLUMNS})
    path = write(tmp_path / name, made_up(900, 3))
    assert len(table_reader.units_of(path, "train", load_table_spec(spec))) > 2
    found = []
    for workers in (1, 2, 4):
        prepare_table(spec, all_splits(path), tmp_path / str(workers), workers=workers)
        found.append(content(tmp_path / str(workers)))
    assert found[0] == found[1] == found[2]


NONE_BAD = MaxBad()
SMALL: dict[str, Any] = {
    "a": {"type": "categorical"},
    "l": {"type": "multi_valued"},
    "x": {"type": "numeric", "missing": -1},
    "y": {"type": "label"},
}


def prepared(
    tmp_path: Path, name: str, data: bytes, max_bad: MaxBad = NONE_BAD, columns: dict[str, Any] = SMALL, **keys: Any
) -> tuple[dict[str, list[Any]], Schema]:
    """(the training rows, categories as their text; the schema) of a file."""
    (tmp_path / name).write_bytes(data)
    spec = write_spec(tmp_path, {"name": "n", **keys, "columns": columns})
    schema = prepare_table(spec, all_splits(tmp_path / name), tmp_path / "out", max_bad=max_bad)
    rows = pq.read_table(tmp_path / "out" / "train").to_pydict()
    for feature in schema.categorical:
        vocabulary = pq.read_table(tmp_path / "out" / "vocabulary" / f"{feature.name}.parquet")["value"].to_pylist()
        words = [None, *vocabulary]
        rows[feature.name] = [[words[i] for i in v] if isinstance(v, list) else words[v] for v in rows[feature.name]]
    return rows, schema


GOOD = b'{"a": "u", "l": ["p", 7, true, null, ""], "x": 1e3, "y": 1}\n'
BAD = [
    (b"[1, 2]", "not an object", r"'[1, 2]', expected an object"),
    (b'"text"', "not an object", "expected an object"),
    (b'{"a": "u", "l": null, "x": NaN, "y": 1}', "not JSON", "NaN is not JSON; where a value is missing, write null"),
    (b'{"a": "u", "l": null, "x": -Infinity, "y": 1}', "not JSON", "-Infinity is not JSON"),
    (b'{"a": {"b": 1}, "l": null, "x": 1, "y": 1}', "a", 'a=\'{"b": "1"}\', expected a value'),
    (b'{"a": [1], "l": null, "x": 1, "y": 1}', "a", "expected a value"),
    (b'{"a": "u", "l": {"b": 1}, "x": 1, "y": 1}', "l", "expected text or a list"),
    (b'{"a": "u", "l": [[1]], "x": 1, "y": 1}', "l", "is in the list, expected only values"),
    (b'{"a": "u", "a": "v", "l": null, "x": 1, "y": 1}', "duplicate key", "the key 'a' appears twice"),
    (b'{"a": "u", "l": null, "y": 1}', "missing key", "the key 'x' is missing; where a value is missing, write null"),
    (b'{"a": "u", "l": null, "x": 1, "y": 1, "z": 2}', "undeclared key", "the key 'z' is not declared"),
    (b'{"a": "u", "l": null, "x": "one", "y": 1}', "x", "x='one', expected a number"),
    (b'{"a": "u", "l": null, "x": 1e999, "y": 1}', "x", "expected a finite number"),
    (b'{"a": "u", "l": null, "x": 1, "y": 2}', "y", "y='2', expected 0 or 1"),
    (b'{"a": "u", "l": null, "x": 1, "y": null}', "y", "y=None, expected 0 or 1"),
    (b'{"a": "u", "l": null, "x": 01, "y": 1}', "not JSON", "delimiter at character"),
    (b'{"a": "u", "l": null, "x": 1, "y": 1', "not JSON", "delimiter at character"),
    (b'{"a": "u", "l": null, "x": 1, "y": 1}{}', "not JSON", "Extra data"),
    (b"{" * 5000, "not JSON", ""),
    (b'{"a": ' + b"[" * 200_000, "not JSON", "too deep"),
    (b'{"a": "\xff", "l": null, "x": 1, "y": 1}', "not UTF-8", 'expected UTF-8; state the "encoding"'),
    (b'{"a": "\\ud800", "l": null, "x": 1, "y": 1}', "not UTF-8", "half of a pair"),
]


def test_bad_rows_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = GOOD + b"".join(line + b"\n" + GOOD for line, _, _ in BAD) + b"\n  \r\n"
    for block in (1 << 10, 1 << 22):
        monkeypatch.setattr(text_files, "_BLOCK_BYTES", block)
        rows, schema = prepared(tmp_path, "t.jsonl", data, MaxBad(3 * len(BAD)))
        assert schema.rows["train"] == len(BAD) + 1 and sum(schema.bad_rows.values()) == 3 * len(BAD)
        assert rows["a"][0] == "u" and rows["l"][0] == ["p", "7", "true"] and rows["x"][0] == 1000
        with (tmp_path / "out" / "quarantine.csv").open(newline="") as file:
            kept = list(csv.DictReader(file))
        assert len(kept) == 3 * len(BAD)
        for number, (row, (_, reason, message)) in enumerate(zip(kept, BAD, strict=False)):
            assert (row["row"], row["reason"]) == (str(2 * number + 1), reason) and message in row["found"], row
    with pytest.raises(UserError, match=r"t\.jsonl: row 1 \(from 0\): '\[1, 2\]', expected an object"):
        prepared(tmp_path, "t.jsonl", data)


@pytest.mark.parametrize("data", [b"[\n{}\n]\n", b'[{"a": 1}, {"a": 2}]', b'{\n  "a": 1\n}\n'])
def test_json_that_is_not_one_object_a_line(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError, match=r"t\.json: .* begins an array or an object of several lines, .*jq -c"):
        prepared(tmp_path, "t.json", data)


def test_json_as_its_writers_mean_it(tmp_path: Path) -> None:
    lines = [
        '{"y": true, "x": "2.5", "l": "p|q", "a": 7.0}',
        '{"a": "7", "l": 7, "x": null, "y": "0"}',
        '{"a": "\\u00e4\\ud83d\\ude00", "l": [], "x": false, "y": 1.0}',
        '{"a": 12345678901234567890123, "l": null, "x": -0.0, "y": 0}',
    ]
    data = ("\ufeff" + "\r\n".join(lines)).encode()
    rows, _ = prepared(tmp_path, "t.json", data)
    assert rows["a"] == ["7", "7", "ä😀", "12345678901234567890123"]
    assert rows["l"] == [["p", "q"], ["7"], [], []]
    assert rows["x"] == [2.5, -1, 0, 0] and rows["y"] == [1, 0, 1, 0]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32", "shift_jis", "utf-8-sig"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv.zst", "t.jsonl.gz"])
def test_encodings_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, name: str) -> None:
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 5)
    words = ["käse", "ÿ"] if encoding != "shift_jis" else ["チーズ", "猫"]
    table = {"a": words, "l": [["p"], None], "x": [1.5, None], "y": [0, 1]}
    text = as_json(table) if "json" in name else as_text(table, "\t" if "tsv" in name else ",")
    data = text.decode().encode(encoding)
    data = gzip.compress(data) if name.endswith("gz") else zstd(data) if name.endswith("zst") else data
    rows, _ = prepared(tmp_path, name, data, encoding=encoding)
    assert rows == {"a": words, "l": [["p"], []], "x": [1.5, -1], "y": [0, 1]}


def test_a_byte_that_the_encoding_does_not_have(tmp_path: Path) -> None:
    data = b"a,l,x,y\nk\x81se,p,1,0\nb,p,1,1\n"
    _, schema = prepared(tmp_path, "t.csv", data, MaxBad(9), encoding="cp1252")
    assert schema.bad_rows == {"not cp1252": 3} and schema.rows["train"] == 1
    with pytest.raises(UserError, match=r"a=b'k\\x81se', expected cp1252, the encoding in the spec"):
        prepared(tmp_path, "t.csv", data, encoding="cp1252")
    with pytest.raises(UserError, match=r"t\.csv: cannot be read: 'utf-16.*' codec can't decode"):
        prepared(tmp_path, "t.csv", "a,l,x,y\nä,p,1,0\n".encode("utf-16")[:-1], encoding="utf-16")
    for wrong in ("latin-99", "hex", "rot13", "undefined", ""):
        with pytest.raises(UserError, match=r"spec\.json: encoding: .* is not a text encoding; examples are"):
            prepared(tmp_path, "t.csv", data, encoding=wrong)


def test_null_words_are_missing_in_every_format(tmp_path: Path) -> None:
    table: Table = {
        "a": ["NA", "nan", "u", "-1"],
        "l": [["p", "NA"], ["NA"], None, ["-1", "q"]],
        "x": [-1, 2, 3, None],
        "y": [0, 1, 0, 1],
    }
    columns = SMALL | {"x": {"type": "numeric", "missing": 9}}
    for name in ("t.csv", "t.jsonl", "t.parquet", "t.arrow"):
        write(tmp_path / name, table)
        rows, _ = prepared(
            tmp_path, name, (tmp_path / name).read_bytes(), columns=columns, null_words=["NA", "-1", "?"]
        )
        assert rows["a"] == [None, "nan", "u", None] and rows["l"] == [["p"], [], [], ["q"]], name
        assert rows["x"] == [9, 2, 3, 9], name
        single = RowEncoder(tmp_path / "out").encode([{"a": "NA", "l": "NA|q", "x": -1}])
        assert single.to_pylist()[0]["x"] == 9 and single["a"].to_pylist() == [0]
    with pytest.raises(UserError, match=r"row 0 .*: y='x{199}\.\.\. \(70,002 characters\), expected 0 or 1"):
        prepared(tmp_path, "t.csv", b"a,l,x,y\nu,p,1,%b\n" % (b"x" * 70_000))
    with pytest.raises(UserError, match=r"row 0 .*: y='\?', expected 0 or 1"):
        prepared(tmp_path, "t.csv", b"a,l,x,y\nu,p,1,?\n", null_words=["?"])


def test_names_by_file(tmp_path: Path) -> None:
    """What `split` makes of a file: only the first part has the line of names."""
    spec = write_spec(tmp_path, {"name": "n", "header": "auto", "columns": SMALL})
    (tmp_path / "a.csv").write_text("l,a,x,y\np|q,u,1,1\n")
    (tmp_path / "b.csv").write_text("v,p,2,0\n")
    (tmp_path / "c.csv").write_text("")
    files = {
        "train": [tmp_path / f"{n}.csv" for n in "abc"],
        "valid": [tmp_path / "b.csv"],
        "test": [tmp_path / "a.csv"],
    }
    prepare_table(spec, files, tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "train")["x"].to_pylist() == [1, 2]
    (tmp_path / "b.csv").write_text("a,l,X,y\nv,p,2,0\n")
    with pytest.raises(UserError, match=r"b\.csv: column 'X' is not declared; known: a, l, x, y"):
        prepare_table(spec, files, tmp_path / "out")


def cut(path: Path, end: int) -> bytes:
    return path.read_bytes()[:end]


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.zst", "t.parquet", "t.arrow", "t.stream.arrow"])
def test_files_that_are_cut_off(tmp_path: Path, name: str) -> None:
    """At every place, the ends of messages of a stream included: nothing is taken for the whole."""
    whole = write(tmp_path / name, {"a": ["u", "v"] * 40, "l": [["p"]] * 80, "x": [1.5] * 80, "y": [0, 1] * 40})
    size = whole.stat().st_size
    data = whole.read_bytes()
    for end in {0, 1, 4, 8, 9, size - 8, size - 9, size - 1, *range(16, size, size // 23)}:
        with pytest.raises(UserError, match=r"t\.[a-z.]+: (cannot be read|is empty|no rows)"):
            prepared(tmp_path, name, data[:end])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["spec.json", name])


def test_arrow_by_other_writers(tmp_path: Path) -> None:
    """Dictionaries, views, run ends, extension types and compressed buffers are the values that they stand for."""
    arrays = {
        "a": pa.array(["u", None, "v"]).dictionary_encode(),
        "l": pa.array([["p", "q"], None, []], pa.list_view(pa.string())),
        "x": pa.RunEndEncodedArray.from_arrays([2, 3], [1.5, 2.5]),
        "y": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, 1], pa.int8())),
    }
    table = pa.table(arrays)
    path = tmp_path / "t.arrow"
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
        writer.write_table(table)
    rows, _ = prepared(tmp_path, "t.arrow", path.read_bytes())
    assert rows == {"a": ["u", None, "v"], "l": [["p", "q"], [], []], "x": [1.5, 1.5, 2.5], "y": [1, 0, 1]}


VECTOR = {
    "v": {"type": "vector", "length": 3, "missing": 0, "standardise": True},
    "t": {"type": "calendar", "format": "%y%m%d%H"},
    "y": {"type": "label"},
}


def test_a_vector_and_a_moment_are_several_features(tmp_path: Path) -> None:
    """As if each had been a column, in every format; single rows as well."""
    vectors = [[1.5, 2.0, 3.0], [0.5, -2.0, 1e-3], None, [2.5, 0.0, 7.0]]
    times, labels = ["14102100", "14102123", None, "14102612"], [0, 1, 0, 1]
    text = "v,t,y\n" + "".join(
        f"{' '.join(map(str, v or []))},{t or ''},{y}\n" for v, t, y in zip(vectors, times, labels, strict=True)
    )
    columns = dict(zip("vty", (vectors, times, labels), strict=True))
    rows = pa.table(columns | {"v": pa.array(vectors, pa.list_(pa.float64(), 3))})
    rows = rows.set_column(1, "t", rows["t"].cast(pa.int64()))
    pq.write_table(rows, tmp_path / "rows.parquet")
    apart = {f"v_{i}": {"type": "numeric", "missing": 0, "standardise": True} for i in range(3)}
    apart |= {f"t_{part}": {"type": "categorical", "dtype": "integer"} for part in ("hour", "weekday")}
    plain = "v_0,v_1,v_2,t_hour,t_weekday,y\n1.5,2,3,0,1,0\n.5,-2,.001,23,1,1\n,,,,,0\n2.5,0,7,12,6,1\n"
    expected, schema = prepared(tmp_path, "t.csv", plain.encode(), columns=apart | {"y": {"type": "label"}})
    assert schema.numeric == ("v_0", "v_1", "v_2") and expected["t_weekday"] == [1, 1, None, 6]
    for name, data in (
        ("u.csv", text.encode()),
        ("u.jsonl", as_json(columns)),
        ("u.parquet", (tmp_path / "rows.parquet").read_bytes()),
    ):
        assert prepared(tmp_path, name, data, columns=VECTOR) == (expected, schema), name
    shards = pq.read_table(tmp_path / "out" / "train").drop_columns("y")
    single = RowEncoder(tmp_path / "out").encode([{"v": v, "t": t} for v, t in zip(vectors, times, strict=True)])
    assert single.equals(shards)
    with pytest.raises(UserError, match=r"row 0: v='1 2', expected 3 numbers"):
        RowEncoder(tmp_path / "out").encode([{"v": "1 2", "t": None}])


def test_vectors_and_moments_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expand, "_NUMBERS", 6)
    rows = ["1 2 3,14102100,1", "1 2,14102100,1", "1 x 3,14102100,1", "1 2 1e999,14102100,1", "1 2 3,14132100,1"]
    data = ("v,t,y\n" + "\n".join(rows) + "\n").encode()
    _, schema = prepared(tmp_path, "t.csv", data, MaxBad(99), columns=VECTOR)
    assert schema.bad_rows == {"v": 3, "v_1": 3, "v_2": 3, "t": 3} and schema.rows["train"] == 1
    with (tmp_path / "out" / "quarantine.csv").open(newline="") as file:
        kept = [(row["row"], row["found"]) for row in csv.DictReader(file)][:4]
    assert [number for number, _ in kept] == ["1", "2", "3", "4"]
    assert kept[0][1] == "v='1 2', expected 3 numbers, as columns.v.length says"
    assert kept[1][1] == "v_1='x', expected a number" and "'14132100', expected a moment written as" in kept[3][1]
    for columns, message in (
        (VECTOR | {"v_1": {"type": "numeric"}}, r"columns\.v_1 is a feature of columns\.v too; rename one"),
        (VECTOR | {"v": {"type": "vector"}}, r"columns\.v\.length is missing"),
        (VECTOR | {"v": {"type": "vector", "length": 0}}, r"columns\.v\.length: Input should be greater than"),
    ):
        with pytest.raises(UserError, match=message):
            prepared(tmp_path, "t.csv", data, columns=columns)
    table = pa.table({"v": [[{"a": 1}] * 3], "t": [1.5], "y": [1]})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"column 'v' has struct.*expected numbers|column 't' is double, expected text"):
        prepared(tmp_path, "x.parquet", (tmp_path / "x.parquet").read_bytes(), columns=VECTOR)
