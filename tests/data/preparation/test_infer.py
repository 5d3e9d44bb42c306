"""A first spec from a sample: what it takes columns for, and that the spec prepares the file it was made from."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarec.data.preparation.infer import in_words, infer
from megarec.data.preparation.prepare import prepare_table
from megarec.data.preparation.splits import Shares
from megarec.data.schema import load_schema
from megarec.errors import UserError
from tests.data.preparation.test_formats import write

ROWS = 2000
EXPECTED = {
    "user_id": {"type": "categorical", "dtype": "integer"},
    "hour": {"type": "categorical", "dtype": "integer"},
    "site": {"type": "categorical"},
    "C1": {"type": "categorical", "dtype": "hexadecimal"},
    "tags": {"type": "multi_valued", "separator": "|"},
    "price": {"type": "numeric"},
    "views": {"type": "numeric", "log": True, "missing": 0.0},
    "note": {"type": "ignored"},
    "empty": {"type": "ignored"},
    "clicked": {"type": "label"},
}


def rows() -> dict[str, list[str]]:
    random = np.random.default_rng(1)
    return {
        "user_id": [str(x) for x in random.integers(0, 500, ROWS)],
        "hour": [str(x) for x in random.integers(0, 24, ROWS)],
        "site": [f"site {x}" for x in random.integers(0, 30, ROWS)],
        "C1": [f"{x:08x}" for x in random.integers(0, 2**32, ROWS)],
        "tags": ["|".join(random.choice(["a", "b", "c", "d"], n, replace=False)) for n in random.integers(1, 4, ROWS)],
        "price": [f"{x:.2f}" for x in random.uniform(1, 50, ROWS)],
        "views": ["" if i % 9 == 0 else str(int(x)) for i, x in enumerate(10 ** random.uniform(0, 6, ROWS))],
        "note": [f"remark number {i}" for i in range(ROWS)],
        "empty": [""] * ROWS,
        "clicked": [str(x) for x in random.integers(0, 2, ROWS)],
    }


@pytest.mark.parametrize(
    ("name", "delimiter", "keys"),
    [
        ("log.csv", ",", {}),
        ("log.csv", ";", {"delimiter": ";"}),
        ("log.tsv", "\t", {}),
        ("log.txt", ";", {"delimiter": ";"}),
    ],
)
def test_columns_are_what_they_look_like(tmp_path: Path, name: str, delimiter: str, keys: dict[str, str]) -> None:
    columns = rows()
    lines = [delimiter.join(row) for row in [list(columns), *zip(*columns.values(), strict=True)]]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    guesses = infer(tmp_path / name, tmp_path / "spec.json")
    spec = json.loads((tmp_path / "spec.json").read_text())
    assert spec == {"name": "log", **keys, "columns": EXPECTED}
    assert all(guess.reason for guess in guesses.columns)
    files = {"all": [tmp_path / name]}
    prepare_table(tmp_path / "spec.json", files, tmp_path / "out", shares=Shares((0.8, 0.1, 0.1)))
    assert sum(load_schema(tmp_path / "out").rows.values()) == ROWS


def test_without_names_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "day.tsv").write_text("1\t5.5\tapple\n0\t7.25\tpear\n")
    infer(tmp_path / "day.tsv", tmp_path / "a.json")
    spec = json.loads((tmp_path / "a.json").read_text())
    assert spec["header"] is False and list(spec["columns"]) == ["column_1", "column_2", "column_3"]
    assert [column["type"] for column in spec["columns"].values()] == ["label", "numeric", "categorical"]
    table = pa.table({"seen": [[1, 2], [3]], "x": [0.5, 1.5], "y": [True, False]})
    pq.write_table(table, tmp_path / "rows.parquet")
    infer(tmp_path / "rows.parquet", tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["columns"] == {
        "seen": {"type": "multi_valued", "dtype": "integer"},
        "x": {"type": "numeric"},
        "y": {"type": "label"},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,4\n", "no column of the sample has only 0 and 1"),
        ("a,y\n", "no rows to infer from"),
        ("", "is empty; expected a line of names"),
    ],
)
def test_what_cannot_be_inferred(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        infer(tmp_path / "x.csv", tmp_path / "spec.json")
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text("edited")
    with pytest.raises(UserError, match="exists already"):
        infer(tmp_path / "x.csv", tmp_path / "spec.json")
    assert (tmp_path / "spec.json").read_text() == "edited"


@pytest.mark.parametrize("name", ["log.jsonl", "log.json.gz", "log.arrow", "log.csv.zst", "log.txt"])
def test_every_format_and_its_reasons(tmp_path: Path, name: str) -> None:
    """Null words, a vector and the encoding are seen, and the spec prepares the file that it was made from."""
    table = {
        "item_id": list(range(20)) * 10,
        "price": [None if i % 5 == 0 else i + 0.5 for i in range(200)],
        "v": [[0.25, float(i), 1.5] for i in range(200)],
        "city": ["NULL" if i % 4 == 0 else f"Köln {i % 3}" for i in range(200)],
        "click": [i % 2 for i in range(200)],
    }
    with mock.patch.dict("tests.data.preparation.test_formats.LISTS", {"v": " "}):
        write(tmp_path / name, table)
    expected = {}
    if name == "log.txt":
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes().decode().replace("\t", ";").encode("latin-1"))
        expected = {"delimiter": ";", "encoding": "latin-1"}
    guesses = infer(tmp_path / name, tmp_path / "spec.json")
    spec = json.loads((tmp_path / "spec.json").read_text())
    vector = spec["columns"].pop("v")
    assert vector["type"] == "vector" and vector["length"] == 3
    assert spec == {
        "name": "log",
        "null_words": ["NULL"],
        **expected,
        "columns": {
            "item_id": {"type": "categorical", "dtype": "integer"},
            "price": {"type": "numeric", "missing": 0.0},
            "city": {"type": "categorical"},
            "click": {"type": "label"},
        },
    }
    assert {g.name: (g.distinct, g.missing) for g in guesses.columns if g.name != "v"} == {
        "item_id": (20, 0),
        "price": (160, 0.2),
        "city": (3, 0.25),
        "click": (2, 0),
    }
    lines = in_words(guesses, name, tmp_path / "spec.json").splitlines()
    assert "  null_words: [\"NULL\"]: 'NULL' stands in 'city'" in lines and "200 rows" in lines[-1]
    schema = prepare_table(
        tmp_path / "spec.json", {"all": [tmp_path / name]}, tmp_path / "out", shares=Shares((0.8, 0.1, 0.1))
    )
    assert schema.numeric == ("price", "v_0", "v_1", "v_2") and sum(schema.rows.values()) == 200
