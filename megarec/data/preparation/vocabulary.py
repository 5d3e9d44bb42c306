"""Raw values -> rows of a table: by a vocabulary counted on the training split, or by a hash."""

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megarec.errors import UserError
from megarec.files import file_name

OUT_OF_VOCABULARY = 0
VOCABULARY_DIRECTORY = "vocabulary"
IDENTITY_VALUES = 1 << 16
_PENDING_LIMIT = 1 << 21


def vocabulary_file(directory: Path, name: str) -> Path:
    """vocabulary/<name>.parquet of a data set, the name as file_name() writes it."""
    return directory / VOCABULARY_DIRECTORY / file_name(name, ".parquet")


def identity_of(kind: pa.DataType, values: Iterable[pa.Array]) -> str:
    """The same for the same values in the same order, on every machine.

    Args:
        values: in parts, each but the last of a whole number of IDENTITY_VALUES.
    """
    digest, count = hashlib.sha256(str(kind).encode()), 0
    for whole in values:
        count += len(whole)
        for start in range(0, len(whole), IDENTITY_VALUES):
            part = whole.slice(start, IDENTITY_VALUES)
            if pa.types.is_string(part.type):
                digest.update(pc.binary_length(part).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
                digest.update("".join(part.to_pylist()).encode())
            else:
                digest.update(part.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return f"vocabulary {digest.hexdigest()[:16]} of {count} values"


def read_values(directory: Path, name: str) -> pa.Array:
    """The values of a saved vocabulary, in the order of their rows.

    Raises:
        UserError: it is missing or damaged.
    """
    path = vocabulary_file(directory, name)
    try:
        table = pq.read_table(path, columns=["value", "row"], use_threads=False)
        values = table["value"].combine_chunks()
        good = values.type in (pa.string(), pa.int64()) and not values.null_count
        if not good or not np.array_equal(table["row"].to_numpy(), np.arange(1, len(table) + 1)):
            raise pa.ArrowInvalid("not the columns value and row of a vocabulary")
    except (OSError, pa.ArrowException, KeyError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read: {why}; prepare the data again") from error
    return values


def in_order(values: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """The values of a vocabulary sorted, and the row of each."""
    order = pc.sort_indices(values).to_numpy().astype(np.int64)
    return values.take(pa.array(order)), order + 1


def _each_distinct(values: pa.Array, row_of: Any) -> NDArray[np.int64]:
    """row_of(value) for every value, called once a distinct value; a null is out of vocabulary."""
    encoded = values.dictionary_encode()
    rows = np.array([*map(row_of, encoded.dictionary.to_pylist()), OUT_OF_VOCABULARY], np.int64)
    return rows[pc.fill_null(encoded.indices, len(rows) - 1).to_numpy(zero_copy_only=False)]


@dataclass(frozen=True)
class Vocabulary:
    """Known values, most frequent first; value i has row i + 1, unknown and null ones have row 0."""

    values: pa.Array

    @functools.cached_property
    def _row(self) -> dict[Any, int]:
        return {value: row for row, value in enumerate(self.values.to_pylist(), start=1)}

    @property
    def rows(self) -> int:
        return len(self.values) + 1

    @property
    def identity(self) -> str:
        """The same for the same values in the same order, on every machine."""
        return identity_of(self.values.type, [self.values])

    def encode(self, values: pa.Array) -> NDArray[np.int64]:
        """Int64 [n]: the row of every value."""
        return _each_distinct(values, lambda value: self._row.get(value, OUT_OF_VOCABULARY))

    def save(self, directory: Path, name: str) -> None:
        """Write vocabulary/<name>.parquet, the name as file_name() writes it, with the columns value and row."""
        (directory / VOCABULARY_DIRECTORY).mkdir(exist_ok=True)
        table = pa.table({"value": self.values, "row": np.arange(1, self.rows, dtype=np.int64)})
        pq.write_table(table, vocabulary_file(directory, name))


@dataclass(frozen=True)
class Hashing:
    """Rows by hash: 1 + (BLAKE2b-64 of the value's text) mod (rows - 1), on every machine; null has row 0."""

    rows: int

    @property
    def identity(self) -> str:
        return f"BLAKE2b-64 of the text into {self.rows} rows"

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
