"""A column beside the batches: the values of the rows that the store has, in its order."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from megarec.data.columns import coded, group_codes, read_column
from megarec.data.store import open_split
from megarec.errors import UserError
from tests.data.prepared import SCHEMA, TYPES, make_rows, write_shard

SESSIONS = [None, "b", "a", "b", *"ccccaa"]


def written(path: Path, shards: int = 2) -> list[dict]:
    """Ten rows of a split `test`, with a column that the schema does not know."""
    rows = [row | {"session": session} for row, session in zip(make_rows(10), SESSIONS, strict=True)]
    for shard in range(shards):
        part = rows[10 * shard // shards : 10 * (shard + 1) // shards]
        write_shard(path / "test" / f"{shard:03d}.parquet", part, TYPES | {"session": pa.string()})
    return rows


def test_the_values_come_in_the_order_of_the_rows(tmp_path: Path) -> None:
    written(tmp_path)
    assert read_column(tmp_path, "test", "session", SCHEMA, skipped=False).to_pylist() == SESSIONS
    found = coded(read_column(tmp_path, "test", "session", SCHEMA, skipped=False))
    assert [None if code < 0 else found.values[code].as_py() for code in found.codes] == SESSIONS
    assert group_codes(tmp_path, "test", "session", SCHEMA, False).tolist() == [-1, 0, 1, 0, 2, 2, 2, 2, 1, 1]
    assert group_codes(tmp_path, "test", "user", SCHEMA, False).tolist() == list(range(10))


def test_rows_that_the_store_leaves_out_are_left_out(tmp_path: Path) -> None:
    rows = written(tmp_path, shards=1)
    rows[1]["user"] = 50
    rows[8]["price"] = float("nan")
    write_shard(tmp_path / "test/000.parquet", rows, TYPES | {"session": pa.string()})
    store = open_split(tmp_path, "test", SCHEMA, "skip")
    assert store.skipped and len(store) == 8
    kept = read_column(tmp_path, "test", "session", SCHEMA, bool(store.skipped)).to_pylist()
    assert kept == [session for place, session in enumerate(SESSIONS) if place not in (1, 8)]
    labels = read_column(tmp_path, "test", "label", SCHEMA, True).to_pylist()
    assert labels == store.gather(np.arange(8))[2].tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [("sesion", "there is no column 'sesion'; did you mean 'session'?"), ("tags", "column 'tags' is list<")],
)
def test_a_column_that_cannot_be_one_is_one_line(tmp_path: Path, name: str, message: str) -> None:
    written(tmp_path)
    with pytest.raises(UserError) as error:
        read_column(tmp_path, "test", name, SCHEMA, skipped=False)
    assert message in str(error.value) and "test/000.parquet" in str(error.value) and "\n" not in str(error.value)
