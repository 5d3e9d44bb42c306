"""Everything that can be wrong with a prepared shard, through the cache builder that users meet."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from megarec.data.batch import Batch, Ids
from megarec.data.cache import Built, ensure_cache
from megarec.data.row_checks import check_batch
from megarec.data.store import open_split
from megarec.errors import UserError
from tests.data.prepared import SCHEMA, TYPES, make_rows, write_shard, write_split

NAN, INF = float("nan"), float("inf")
BAD = [
    ("user", 50, "an id in [0, 50)", {}),
    ("user", -1, "an id in [0, 50)", {}),
    ("user", None, "present", {}),
    ("user", 2**63 + 5, "an id in [0, 50)", {"user": pa.uint64()}),
    ("tags", [1, 9], "an id in [0, 9)", {}),
    ("tags", [1, -2, 3], "an id in [0, 9)", {}),
    ("tags", [1, None], "an id in [0, 9)", {}),
    ("tags", None, "present", {}),
    ("price", NAN, "a finite number", {}),
    ("price", -INF, "a finite number", {}),
    ("price", 1e300, "a finite number", {"price": pa.float64()}),
    ("price", None, "present", {}),
    ("label", 2, "0 or 1", {}),
    ("label", 0.5, "0 or 1", {"label": pa.float32()}),
    ("label", None, "present", {}),
]


def build(path: Path, bad_rows: Any = "error") -> Path:
    return ensure_cache(path, "train", SCHEMA, bad_rows)[0]


def skipped(path: Path) -> dict[str, int]:
    built: Built = ensure_cache(path, "train", SCHEMA, "skip")[1]
    return built.skipped


@pytest.mark.parametrize(("column", "value", "expected", "types"), BAD)
def test_a_bad_row_is_named_or_skipped(
    tmp_path: Path, column: str, value: Any, expected: str, types: dict[str, pa.DataType]
) -> None:
    rows = make_rows(20)
    write_shard(tmp_path / "train" / "000.parquet", rows[:8], TYPES | types)
    rows[13][column] = value
    write_shard(tmp_path / "train" / "001.parquet", rows[8:], TYPES | types)
    bad_id = next((v for v in value if v not in range(9)), None) if isinstance(value, list) else value
    message = (
        rf"train/001\.parquet: row 5 \(from 0\): {column}={re.escape(repr(bad_id))}, expected {re.escape(expected)}"
    )
    with pytest.raises(UserError, match=message + r"; fix .*data\.bad_rows='skip'"):
        build(tmp_path)
    assert skipped(tmp_path) == {f"{column} is not {expected}": 1}


def test_a_row_with_two_defects_is_skipped_once(tmp_path: Path) -> None:
    rows = make_rows(10)
    rows[2].update(user=99, label=7)
    rows[4].update(label=7)
    write_split(tmp_path, "train", rows)
    assert skipped(tmp_path) == {"user is not an id in [0, 50)": 1, "label is not 0 or 1": 1}


@pytest.mark.parametrize(
    ("column", "kind", "value", "message"),
    [
        ("user", pa.string(), "7", "column 'user' is string, expected int64"),
        ("user", pa.float64(), 7.0, "column 'user' is double, expected int64"),
        ("user", pa.list_(pa.int64()), [7], r"column 'user' is list<.*>, expected int64"),
        ("tags", pa.int64(), 7, r"column 'tags' is int64, expected list<int64> \(the feature is multi-valued\)"),
        ("tags", pa.list_(pa.string()), ["7"], r"column 'tags' is list<.*string>, expected list<int64>"),
        ("price", pa.string(), "7", "column 'price' is string, expected float32"),
        ("label", pa.string(), "1", "column 'label' is string, expected 0 or 1"),
    ],
)
def test_a_wrong_type(tmp_path: Path, column: str, kind: pa.DataType, value: Any, message: str) -> None:
    rows = [row | {column: value} for row in make_rows(5)]
    write_shard(tmp_path / "train" / "000.parquet", rows, TYPES | {column: kind})
    with pytest.raises(UserError, match=r"000\.parquet: " + message):
        build(tmp_path)


@pytest.mark.parametrize("kind", [pa.int32(), pa.uint8(), pa.uint64()])
def test_other_types_that_fit_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    rows = [row | {"label": bool(row["label"])} for row in make_rows(12)]
    types = TYPES | {"user": kind, "tags": pa.large_list(kind), "label": pa.bool_(), "price": pa.float64()}
    write_shard(tmp_path / "train" / "000.parquet", rows, types)
    numeric, ids, labels = open_split(tmp_path, "train", SCHEMA, "error").gather(np.arange(12))
    for name in ("user", "item"):
        assert ids[name].values.tolist() == [row[name] for row in rows]
    assert ids["tags"].values.tolist() == [tag for row in rows for tag in row["tags"]]
    assert numeric.tolist() == [[row["price"], row["age"]] for row in rows]
    assert labels.tolist() == [row["label"] for row in rows]


def test_a_missing_column(tmp_path: Path) -> None:
    rows = [row | {"pricee": 1.0} for row in make_rows(5)]
    types = {name if name != "price" else "pricee": kind for name, kind in TYPES.items()}
    write_shard(tmp_path / "train" / "000.parquet", rows, types)
    with pytest.raises(UserError, match=r"000\.parquet: column 'price' is missing; did you mean 'pricee'\?"):
        build(tmp_path)


def made_batch(numeric: int = 2, **ids: list[int]) -> Batch:
    ids = {"user": [0, 49], "tags": [8, 0, 1], "item": [29, 0], "history": []} | ids
    jagged = {"tags": torch.tensor([1, 2]), "history": torch.tensor([0, 0])}
    of = {name: Ids(torch.tensor(values, dtype=torch.int64), jagged.get(name)) for name, values in ids.items()}
    return Batch(torch.zeros(2, numeric), of, torch.zeros(2), torch.arange(2), 2)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (made_batch(user=[0, 50]), "batch.ids['user'] holds 50: expected an id in [0, 50)"),
        (made_batch(item=[-1, 3]), "batch.ids['item'] holds -1: expected an id in [0, 30)"),
        (made_batch(tags=[1, 9, 2]), "batch.ids['tags'] holds 9: expected an id in [0, 9)"),
        (made_batch(numeric=3), "batch.numeric is [2, 3], expected [2, 2]: a column for each of ['price', 'age']"),
    ],
)
def test_a_batch_that_people_made(batch: Batch, message: str) -> None:
    """Its ids go to tables that do not look: one past the end is a row of the next table."""
    check_batch(made_batch(), SCHEMA)
    with pytest.raises(UserError) as refused:
        check_batch(batch, SCHEMA)
    assert str(refused.value) == message
    del batch.ids["item"]
    with pytest.raises(UserError, match=r"batch\.(ids misses 'item'; it has user, tags, history|numeric is)"):
        check_batch(batch, SCHEMA)


def test_lists_of_a_sequence_are_equally_long_in_a_batch_that_people_made() -> None:
    check_batch(made_batch(), SCHEMA, [["tags"], ["history"]])
    message = r"row 0 \(from 0\) has 1 values of tags and 0 of history: .* must be equally long"
    with pytest.raises(UserError, match=message):
        check_batch(made_batch(), SCHEMA, [["tags", "history"]])
