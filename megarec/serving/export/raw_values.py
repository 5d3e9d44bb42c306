"""How raw values become ids and numbers, out of a prepared data set, in the files that a scorer reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megarec.data.preparation.table_spec import MultiValued, Numeric, TableSpec
from megarec.data.preparation.vocabulary import read_values, vocabulary_file
from megarec.data.schema import CategoricalFeature, Schema
from megarec.files import file_name
from megarec.serving.scorer.look_ups import text_hash

VOCABULARY = "vocabulary"


def write_raw_values(schema: Schema, data: Path, spec: TableSpec | None, target: Path) -> tuple[dict[str, Any], ...]:
    """Write the vocabularies of the features below `target`.

    Args:
        schema: the features of the model.
        data: the prepared data set that it was trained on.
        spec: of that data set; None: it keeps none, and its vocabularies say what the values are.

    Returns:
        For categorical and for numeric features, by name, what the manifest says of their raw values.

    Raises:
        UserError: a vocabulary is missing or damaged.
    """
    (target / VOCABULARY).mkdir()
    written: dict[str, dict[str, Any]] = {}
    ids = {feature.name: _ids(feature, data, spec, target, written) for feature in schema.categorical}
    return ids, {name: _number(name, spec) for name in schema.numeric}


def _ids(
    feature: CategoricalFeature, data: Path, spec: TableSpec | None, target: Path, written: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    column = None if spec is None else spec.ids[feature.name]
    owner = (column.table if column is not None else feature.table) or feature.name
    about: dict[str, Any] = {"column": feature.name}
    if isinstance(column, MultiValued):
        about["separator"] = column.separator
    if spec is not None and feature.weighted:
        about["weights"] = spec.weights[feature.name]
    elif feature.weighted:
        about["weights"] = feature.weights_column
    hashed = None if spec is None else spec.ids[owner].hash
    if column is not None and hashed is not None:
        return about | {"kind": "hash", "dtype": column.dtype}
    if owner not in written:
        written[owner] = _write_vocabulary(owner, data, None if column is None else column.dtype, target)
    return about | written[owner]


def _write_vocabulary(name: str, data: Path, dtype: str | None, target: Path) -> dict[str, Any]:
    """Sorted values, or texts sorted by their hash, and the row of each."""
    if dtype is None and not vocabulary_file(data, name).is_file():
        return {"kind": "row"}
    values, _ = read_values(data, name)
    stem = f"{VOCABULARY}/{file_name(name)}"
    about: dict[str, Any] = {"kind": "vocabulary", "rows": f"{stem}.rows"}
    if values.type != pa.string():
        keys = values.to_numpy().astype("<i8")
        order = np.argsort(keys, kind="stable")
        keys[order].tofile(target / f"{stem}.keys")
        about |= {"dtype": dtype or "integer", "keys": f"{stem}.keys"}
    else:
        texts = [text.encode() for text in values.to_pylist()]
        hashes = np.fromiter((text_hash(text) for text in values.to_pylist()), "<u8", len(texts))
        order = np.argsort(hashes, kind="stable")
        hashes[order].tofile(target / f"{stem}.hashes")
        sizes = np.fromiter(map(len, texts), "<i8", len(texts))
        np.cumsum(sizes[order]).astype("<i8").tofile(target / f"{stem}.ends")
        (target / f"{stem}.text").write_bytes(b"".join(texts[place] for place in order))
        about |= {"dtype": "string"} | {part: f"{stem}.{part}" for part in ("hashes", "ends", "text")}
    (order + 1).astype("<i8").tofile(target / f"{stem}.rows")
    return about


def _number(name: str, spec: TableSpec | None) -> dict[str, Any]:
    column = None if spec is None else spec.columns[name]
    if not isinstance(column, Numeric):
        return {"column": name, "log": False, "missing": None, "moments": None}
    return {"column": name, "log": column.log, "missing": column.missing, "moments": None}
