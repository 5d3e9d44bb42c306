"""How raw values become ids and numbers, out of a prepared data set, in the files that a scorer reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megarec.data.preparation.kept_spec import KeptSpec
from megarec.data.preparation.table_spec import Bucketised, Calendar, Lists, Numeric, Sequence, TableSpec, Vector
from megarec.data.preparation.vocabulary import read_values, vocabulary_file
from megarec.data.schema import CategoricalFeature, Schema
from megarec.files import file_name
from megarec.serving.scorer.look_ups import text_hash

VOCABULARY = "vocabulary"
SEPARATOR = "|"  # of lists in text, where no spec names one


def write_raw_values(
    schema: Schema, data: Path, kept: KeptSpec | None, target: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the vocabularies of the features below `target`.

    Args:
        schema: the features of the model.
        data: the prepared data set that it was trained on.
        kept: its rules; None: it keeps none, and its vocabularies have the values.

    Returns:
        For categorical and for numeric features, by name, the manifest's entries of their raw values.

    Raises:
        UserError: a vocabulary is missing or damaged.
    """
    (target / VOCABULARY).mkdir()
    writer = _Vocabularies(data, target)
    if kept is None:
        ids = {feature.name: _as_known(feature, schema, writer) for feature in schema.categorical}
        return ids, {name: _number(name, Numeric(type="numeric"), None) for name in schema.numeric}
    features, sources = kept.spec.features, _sources(kept.spec)
    numbers = {name: _number(name, features.columns[name], kept.fitted.moments.get(name)) for name in schema.numeric}
    ids = {feature.name: _ids(feature.name, kept, writer) for feature in schema.categorical}
    return (
        {name: about | sources.get(name, {}) for name, about in ids.items()},
        {name: about | sources.get(name, {}) for name, about in numbers.items()},
    )


def _as_known(feature: CategoricalFeature, schema: Schema, writer: "_Vocabularies") -> dict[str, Any]:
    """A feature of a data set without a spec: values of its vocabulary, or rows of the table.

    MovieLens's history has the values of item_id and a table of its own: its identity says so.
    """
    about: dict[str, Any] = {"column": feature.name}
    if feature.multi_valued:
        about["separator"] = SEPARATOR
    if feature.weighted:
        about["weights"] = feature.weights_column
    owner, identity = feature.table or feature.name, schema.identity
    same = [name for name, text in identity.items() if text == identity.get(owner)]
    known = [name for name in (owner, *same) if vocabulary_file(writer.data, name).is_file()]
    return about | (writer.write(known[0]) if known else {"kind": "row"})


def _sources(spec: TableSpec) -> dict[str, dict[str, Any]]:
    """Of features that are parts of a column: which one, and how they lie in it."""
    found: dict[str, dict[str, Any]] = {}
    for name, column in spec.columns.items():
        if isinstance(column, Vector):
            about = {"column": name, "length": column.length, "separator": column.separator}
            found |= {feature: about | {"place": place} for place, feature in enumerate(column.features(name))}
        elif isinstance(column, Calendar):
            parts = zip(column.features(name), ("hour", "weekday"), strict=True)
            found |= {feature: {"column": name, "moment": part, "format": column.format} for feature, part in parts}
    return found


def _ids(name: str, kept: KeptSpec, writer: "_Vocabularies") -> dict[str, Any]:
    spec = kept.spec.features
    column = spec.columns[name]
    about: dict[str, Any] = {"column": name}
    if isinstance(column, Bucketised):
        return about | {"kind": "buckets", "boundaries": kept.fitted.boundaries[name]}
    ids = spec.ids[name]
    if isinstance(column, Lists):
        about["separator"] = column.separator
        if name in spec.weights:
            about["weights"] = spec.weights[name]
    if isinstance(column, Sequence):
        about |= {"max_length": column.max_length, "newest": column.newest}
    owner = ids.table or name
    if spec.ids[owner].hash is not None:
        return about | {"kind": "hash", "dtype": ids.dtype}
    return about | writer.write(owner) | {"dtype": ids.dtype}


def _number(name: str, column: object, moments: tuple[float, float] | None) -> dict[str, Any]:
    assert isinstance(column, Numeric)
    return {"column": name, "log": column.log, "missing": column.missing, "moments": moments}


class _Vocabularies:
    """Writes each vocabulary once, as sorted files.

    Args:
        data: the prepared data set.
        target: the export.
    """

    def __init__(self, data: Path, target: Path) -> None:
        self.data, self._target = data, target
        self._written: dict[str, dict[str, Any]] = {}

    def write(self, name: str) -> dict[str, Any]:
        """The manifest's entry of a vocabulary."""
        if name not in self._written:
            values = read_values(self.data, name)
            stem = f"{VOCABULARY}/{file_name(name)}"
            parts, order = _texts(values) if values.type == pa.string() else _numbers(values)
            for part, content in (parts | {"rows": (order + 1).astype("<i8")}).items():
                content.tofile(self._target / f"{stem}.{part}")
            about = {part: f"{stem}.{part}" for part in (*parts, "rows")}
            kind = "string" if values.type == pa.string() else "integer"
            self._written[name] = {"kind": "vocabulary", "dtype": kind, **about}
        return self._written[name]


def _numbers(values: pa.Array) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """Rising, and the place of each in the vocabulary."""
    keys = values.to_numpy().astype("<i8")
    order = np.argsort(keys, kind="stable")
    return {"keys": keys[order]}, order


def _texts(values: pa.Array) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """In the order of their hashes, and the place of each in the vocabulary."""
    hashes = np.fromiter(map(text_hash, values.to_pylist()), "<u8", len(values))
    order = np.argsort(hashes, kind="stable")
    placed = values.take(pa.array(order)).cast(pa.large_binary())
    sizes = pc.binary_length(placed).to_numpy(zero_copy_only=False)
    text = np.frombuffer(b"".join(placed.to_pylist()), np.uint8)
    return {"hashes": hashes[order], "ends": np.cumsum(sizes).astype("<i8"), "text": text}, order
