"""People's own CSV, TSV or parquet files -> a prepared data set: one pass to count, one to write."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megarec.data.schema import SPLITS, CategoricalFeature, Schema, identity_difference, load_schema, save_schema
from megarec.data.sources.table_reader import Part, read_parts
from megarec.data.sources.table_spec import Categorical, Numeric, TableSpec, load_table_spec
from megarec.data.sources.values import id_lists, id_values, labels, numbers, weights
from megarec.data.sources.vocabulary import Encoder, Hashing, Vocabulary, VocabularyCounter
from megarec.data.writing import SplitWriter, check_output, write_dataset
from megarec.errors import UserError

_KINDS = {"string": pa.string(), "integer": pa.int64()}


def prepare_table(
    spec_file: Path, files: dict[str, list[Path]], output: Path, vocabulary: Path | None = None
) -> Schema:
    """Write people's own files as a prepared data set, streamed: memory grows with the vocabularies only.

    Args:
        spec_file: JSON of a TableSpec.
        files: the files of train, valid and test; with `vocabulary` some of these will do.
        vocabulary: a prepared data set whose vocabularies are used; None: they are counted on the training files.

    Raises:
        UserError: names the file, and the key or the row and column, with the value seen and what was expected.
    """
    check_output(output)
    spec = load_table_spec(spec_file)
    old = None if vocabulary is None else load_schema(vocabulary)
    encoders = _encoders(spec, files["train"]) if vocabulary is None else _loaded(spec, vocabulary)
    if old is not None and (other := identity_difference(old.identity, _identity(spec, encoders))):
        raise UserError(f"--vocabulary {vocabulary}: {other.partition(';')[0]}; correct {spec_file}")
    return write_dataset(output, lambda partial: _write(partial, spec, files, encoders, old))


def _write(
    directory: Path,
    spec: TableSpec,
    files: dict[str, list[Path]],
    encoders: dict[str, Encoder],
    old: Schema | None,
) -> Schema:
    for name, encoder in encoders.items():
        if isinstance(encoder, Vocabulary) and spec.ids[name].table is None:
            encoder.save(directory, name)
    rows: dict[str, int] = {}
    lengths: Counter[str] = Counter()  # ids of the training split, or else of all
    unknown: dict[str, dict[str, float]] = {}
    for split in (split for split in SPLITS if split in files):
        values, missed = Counter[str](), Counter[str]()
        with SplitWriter(directory / split) as writer:
            for part in read_parts(files[split], spec):
                encoded, present = _encoded(part, spec, encoders)
                writer.write(encoded)
                for name, count in present.items():
                    values[name] += count
                    missed[name] += count - _known(encoded.column(name))
                if split == "train":
                    lengths.update({name: _count_ids(encoded.column(name)) for name in spec.ids})
        rows[split] = writer.rows
        unknown[split] = {
            name: round(missed[name] / max(values[name], 1), 6)
            for name in spec.ids
            if isinstance(encoders[name], Vocabulary)
        }
    means = {name: count / rows["train"] for name, count in lengths.items()}
    if old is not None:
        means |= {feature.name: feature.mean_length for feature in old.categorical}
    schema = _schema(spec, encoders, rows, means).model_copy(update={"unknown": unknown})
    save_schema(schema, directory)
    return schema


def _loaded(spec: TableSpec, vocabulary: Path) -> dict[str, Encoder]:
    """The encoders of a data set that was prepared before."""
    encoders: dict[str, Encoder] = {}
    for name, column in spec.ids.items():
        if column.table is not None:
            continue
        if column.hash is not None:
            encoders[name] = Hashing(column.hash)
            continue
        encoders[name] = words = Vocabulary.load(vocabulary, name)
        if words.values.type != _KINDS[column.dtype]:
            found = "integer" if words.values.type == pa.int64() else "string"
            raise UserError(
                f"--vocabulary {vocabulary}: {name} was prepared as dtype {found!r}, the spec says {column.dtype!r}"
            )
    return encoders | {name: encoders[c.table] for name, c in spec.ids.items() if c.table is not None}


def _identity(spec: TableSpec, encoders: dict[str, Encoder]) -> dict[str, str]:
    """By feature, how raw values become numbers."""
    found = {name: encoders[name].identity for name in spec.ids}
    for name, column in spec.columns.items():
        if isinstance(column, Numeric):
            transform = "sign(x) log(1 + |x|)" if column.log else "x"
            found[name] = transform if column.missing is None else f"{transform}, {column.missing:g} where missing"
    return found


def _encoders(spec: TableSpec, train: list[Path]) -> dict[str, Encoder]:
    """How each column's values become rows; vocabularies are counted on the training split alone."""
    owners = {name: column for name, column in spec.ids.items() if column.table is None}
    encoders: dict[str, Encoder] = {n: Hashing(column.hash) for n, column in owners.items() if column.hash is not None}
    counters = {n: VocabularyCounter(_KINDS[column.dtype]) for n, column in owners.items() if n not in encoders}
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


def _encoded(part: Part, spec: TableSpec, encoders: dict[str, Encoder]) -> tuple[pa.Table, dict[str, int]]:
    """The rows as numbers, and how many values of each categorical feature are there (not missing)."""
    columns: dict[str, pa.Array] = {}
    present = {}
    for name, column in spec.columns.items():
        if isinstance(column, Categorical):
            values = id_values(part, name, column)
            present[name] = len(values) - values.null_count
            columns[name] = pa.array(encoders[name].encode(values))
        elif column.type == "multi_valued":
            values, lengths = id_lists(part, name, column)
            present[name] = len(values)
            offsets = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(encoders[name].encode(values)))
            if name in spec.weights:
                found = pa.array(weights(part, spec.weights[name], name, column))
                columns[f"{name}:weights"] = pa.ListArray.from_arrays(offsets, found)
        elif isinstance(column, Numeric):
            columns[name] = pa.array(numbers(part, name, column))
        elif column.type == "label":
            columns[name] = pa.array(labels(part, name))
    return pa.table(columns), present


def _known(column: pa.ChunkedArray) -> int:
    """How many ids are not row 0."""
    chunks = [chunk.flatten() if pa.types.is_list(chunk.type) else chunk for chunk in column.chunks]
    return sum(int(np.count_nonzero(chunk.to_numpy(zero_copy_only=False))) for chunk in chunks)


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
                "mean_length": round(mean_lengths.get(name, 1.0), 3),
            }
        features.append(CategoricalFeature(name=name, rows=encoders[name].rows, table=column.table, **many))
    return Schema(
        name=spec.name,
        label=spec.label,
        label_rule=spec.label_rule,
        categorical=tuple(features),
        numeric=tuple(name for name, column in spec.columns.items() if isinstance(column, Numeric)),
        rows=rows,
        identity=_identity(spec, encoders),
        source=f"table: prepared from the user's files of {spec.name}",
    )
