"""A prepared data set written with plain pyarrow, for tests that must not trust the package's own writers."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megarec.data.schema import Schema

Row = dict[str, Any]
SCHEMA = Schema.model_validate(
    {
        "name": "test",
        "categorical": [
            {"name": "user", "rows": 50},
            {"name": "tags", "rows": 9, "multi_valued": True},
            {"name": "item", "rows": 30},
            {"name": "history", "rows": 30, "multi_valued": True, "pooling": "mean", "table": "item"},
        ],
        "numeric": ["price", "age"],
        "rows": {},
    }
)
TYPES = {
    "user": pa.int64(),
    "tags": pa.list_(pa.int64()),
    "item": pa.int64(),
    "history": pa.list_(pa.int64()),
    "price": pa.float32(),
    "age": pa.float32(),
    "label": pa.int8(),
}


def make_rows(count: int) -> list[Row]:
    """Rows that differ in every column; some lists are empty."""
    return [
        {
            "user": i % 50,
            "tags": [(i + j) % 9 for j in range(i % 4)],
            "item": i * 7 % 30,
            "history": [(i * 3 + j) % 30 for j in range(i * 5 % 6)],
            "price": i / 8,
            "age": -float(i),
            "label": i * i % 3 % 2,
        }
        for i in range(count)
    ]


def write_shard(path: Path, rows: list[Row], types: dict[str, pa.DataType] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    types = types or TYPES
    pq.write_table(pa.table({name: pa.array([r[name] for r in rows], kind) for name, kind in types.items()}), path)


def write_split(directory: Path, split: str, rows: list[Row], shards: int = 1) -> None:
    for shard in range(shards):
        part = rows[len(rows) * shard // shards : len(rows) * (shard + 1) // shards]
        write_shard(directory / split / f"{shard:03d}.parquet", part)


def write_prepared(directory: Path, count: int = 40) -> list[Row]:
    """All splits and schema.json; returns the training rows."""
    rows = make_rows(count)
    for split in ("train", "valid", "test"):
        write_split(directory, split, rows)
    schema = SCHEMA.model_copy(update={"rows": dict.fromkeys(("train", "valid", "test"), count)})
    (directory / "schema.json").write_text(json.dumps(schema.model_dump()))
    return rows
