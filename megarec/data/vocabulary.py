"""From raw values to rows of a table: a vocabulary counted on the training split, or a hash."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

OUT_OF_VOCABULARY = 0
VOCABULARY_DIRECTORY = "vocabulary"
_PENDING_LIMIT = 1 << 21


def _each_distinct(values: pa.Array, row_of: Any) -> NDArray[np.int64]:
    """row_of(value) for every value, called once a distinct value; a null is out of vocabulary."""
    encoded = values.dictionary_encode()
    rows = np.array([*map(row_of, encoded.dictionary.to_pylist()), OUT_OF_VOCABULARY], np.int64)
    return rows[pc.fill_null(encoded.indices, len(rows) - 1).to_numpy(zero_copy_only=False)]


@dataclass(frozen=True)
class Vocabulary:
    """Known values, most frequent first; value i has row i + 1, whatever is unknown or null has row 0."""

    values: pa.Array
    _row: dict[Any, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_row", {value: row for row, value in enumerate(self.values.to_pylist(), start=1)})

    @property
    def rows(self) -> int:
        return len(self.values) + 1

    def encode(self, values: pa.Array) -> NDArray[np.int64]:
        """Int64 [n]: the row of every value."""
        return _each_distinct(values, lambda value: self._row.get(value, OUT_OF_VOCABULARY))

    def save(self, directory: Path, name: str) -> None:
        """Write vocabulary/<name>.parquet with the columns value and row."""
        (directory / VOCABULARY_DIRECTORY).mkdir(exist_ok=True)
        table = pa.table({"value": self.values, "row": np.arange(1, self.rows, dtype=np.int64)})
        pq.write_table(table, directory / VOCABULARY_DIRECTORY / f"{name}.parquet")


@dataclass(frozen=True)
class Hashing:
    """Rows by hash: 1 + (BLAKE2b-64 of the value's text) mod (rows - 1), alike on every machine; null has row 0."""

    rows: int

    def encode(self, values: pa.Array) -> NDArray[np.int64]:
        """Int64 [n]: the row of every value."""
        return _each_distinct(values, self._row_of)

    def _row_of(self, value: Any) -> int:
        digest = hashlib.blake2b(str(value).encode(), digest_size=8).digest()
        return 1 + int.from_bytes(digest, "little") % (self.rows - 1)


class VocabularyCounter:
    """Counts values of a stream; memory grows with the distinct values only."""

    def __init__(self, kind: pa.DataType) -> None:
        self._schema = pa.schema([("value", kind), ("count", pa.int64())])
        self._counted = self._schema.empty_table()
        self._pending: list[pa.Table] = []
        self._pending_rows = 0

    def add(self, values: pa.Array) -> None:
        counts = values.drop_null().value_counts()
        self._pending.append(pa.table([counts.field("values"), counts.field("counts")], schema=self._schema))
        self._pending_rows += len(counts)
        if self._pending_rows > _PENDING_LIMIT:
            self._merge()

    def _merge(self) -> None:
        together = pa.concat_tables([self._counted, *self._pending])
        summed = together.group_by("value").aggregate([("count", "sum")])
        self._counted = pa.table([summed["value"], summed["count_sum"]], schema=self._schema)
        self._pending, self._pending_rows = [], 0

    def vocabulary(self, min_count: int = 1) -> Vocabulary:
        """The values seen at least `min_count` times; ties of the count in the order of the values."""
        self._merge()
        kept = self._counted.filter(pc.greater_equal(self._counted["count"], min_count))
        ordered = kept.sort_by([("count", "descending"), ("value", "ascending")])
        return Vocabulary(ordered["value"].combine_chunks())
