"""People's own CSV, TSV or parquet files -> a prepared data set: one pass to count, one to write."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megarec.data.schema import SPLITS, CategoricalFeature, Schema, save_schema
from megarec.data.table_reader import Part, id_lists, id_values, labels, numbers, read_parts, weights
from megarec.data.table_spec import Categorical, Numeric, TableSpec, load_table_spec
from megarec.data.vocabulary import Hashing, Vocabulary, VocabularyCounter
from megarec.data.writing import SplitWriter, check_output, write_dataset

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
