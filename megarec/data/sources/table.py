"""People's own CSV, TSV or parquet files -> a prepared data set: one pass to count, one to write.

A raw value becomes a row of a table by a vocabulary counted on the training split, or by a hash.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megarec.data.schema import SPLITS, CategoricalFeature, Schema, save_schema
from megarec.data.sources.table_reader import Part, read_parts
from megarec.data.sources.table_spec import Categorical, Numeric, TableSpec, load_table_spec
from megarec.data.sources.values import id_lists, id_values, labels, numbers, weights
from megarec.data.writing import SplitWriter, check_output, write_dataset

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


Encoder = Vocabulary | Hashing


def prepare_table(spec_file: Path, files: dict[str, list[Path]], output: Path) -> Schema:
    """Write people's own files as a prepared data set, streamed: memory grows with the vocabularies only.

    Args:
        spec_file: JSON of a TableSpec.
        files: the files of train, valid and test.

    Raises:
        UserError: names the file, and the key or the row and column, with the value seen and what was expected.
    """
    check_output(output)
    spec = load_table_spec(spec_file)
    return write_dataset(output, lambda partial: _write(partial, spec, files))


def _write(directory: Path, spec: TableSpec, files: dict[str, list[Path]]) -> Schema:
    encoders = _encoders(spec, files["train"])
    for name, encoder in encoders.items():
        if isinstance(encoder, Vocabulary) and spec.ids[name].table is None:
            encoder.save(directory, name)
    rows = {}
    ids = dict.fromkeys(spec.ids, 0)  # of the training split
    for split in SPLITS:
        with SplitWriter(directory / split) as writer:
            for part in read_parts(files[split], spec):
                encoded = _encoded(part, spec, encoders)
                writer.write(encoded)
                if split == "train":
                    ids = {name: count + _count_ids(encoded.column(name)) for name, count in ids.items()}
        rows[split] = writer.rows
    schema = _schema(spec, encoders, rows, {name: count / rows["train"] for name, count in ids.items()})
    save_schema(schema, directory)
    return schema


def _encoders(spec: TableSpec, train: list[Path]) -> dict[str, Encoder]:
    """How each column's values become rows; vocabularies are counted on the training split alone."""
    owners = {name: column for name, column in spec.ids.items() if column.table is None}
    encoders: dict[str, Encoder] = {n: Hashing(column.hash) for n, column in owners.items() if column.hash is not None}
    kinds = {"string": pa.string(), "integer": pa.int64()}
    counters = {n: VocabularyCounter(kinds[column.dtype]) for n, column in owners.items() if n not in encoders}
    if counters:
        for part in read_parts(train, spec):
            for name, counter in counters.items():
                column = owners[name]
                if isinstance(column, Categorical):
                    counter.add(id_values(part, name, column))
                else:
                    counter.add(id_lists(part, name, column)[0])
    encoders |= {name: counter.vocabulary(owners[name].min_count) for name, counter in counters.items()}
    return encoders | {name: encoders[c.table] for name, c in spec.ids.items() if c.table is not None}


def _encoded(part: Part, spec: TableSpec, encoders: dict[str, Encoder]) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    for name, column in spec.columns.items():
        if isinstance(column, Categorical):
            columns[name] = pa.array(encoders[name].encode(id_values(part, name, column)))
        elif column.type == "multi_valued":
            values, lengths = id_lists(part, name, column)
            offsets = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(encoders[name].encode(values)))
            if name in spec.weights:
                found = pa.array(weights(part, spec.weights[name], name, column))
                columns[f"{name}:weights"] = pa.ListArray.from_arrays(offsets, found)
        elif isinstance(column, Numeric):
            columns[name] = pa.array(numbers(part, name, column))
        elif column.type == "label":
            columns[name] = pa.array(labels(part, name))
    return pa.table(columns)


def _count_ids(column: pa.ChunkedArray) -> int:
    return sum(len(chunk.flatten()) if pa.types.is_list(chunk.type) else len(chunk) for chunk in column.chunks)


def _schema(
    spec: TableSpec, encoders: dict[str, Encoder], rows: dict[str, int], mean_lengths: dict[str, float]
) -> Schema:
    features = []
    for name, column in spec.ids.items():
        many: dict[str, Any] = {}
        if not isinstance(column, Categorical):
            many = {
                "multi_valued": True,
                "pooling": column.pooling,
                "weighted": name in spec.weights,
                "mean_length": round(mean_lengths[name], 3),
            }
        features.append(CategoricalFeature(name=name, rows=encoders[name].rows, table=column.table, **many))
    return Schema(
        name=spec.name,
        label=spec.label,
        label_rule=spec.label_rule,
        categorical=tuple(features),
        numeric=tuple(name for name, column in spec.columns.items() if isinstance(column, Numeric)),
        rows=rows,
        source=f"table: prepared from the user's files of {spec.name}",
    )
