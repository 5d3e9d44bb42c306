"""What can be wrong in a prepared parquet shard: its columns, then its rows, column by column; and in a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from megarec.data.batch import Batch
from megarec.data.schema import CategoricalFeature, Schema
from megarec.errors import UserError, did_you_mean

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Defect:
    """Rows of a record batch that have the same thing wrong.

    Attributes:
        rows: bool [n], which rows; at least one.
        value: the value seen in the first of them.
        expected: what was expected.
    """

    column: str
    rows: Mask
    value: Any
    expected: str

    @property
    def reason(self) -> str:
        return f"{self.column} is not {self.expected}"


def check_columns(path: Path, columns: pa.Schema, schema: Schema) -> None:
    """Every column that the schema wants is there, with a type that can hold it.

    Raises:
        UserError: names the file, the column, the type seen and the one expected.
    """

    def check(name: str, fits: Any, expected: str) -> None:
        if name not in columns.names:
            raise UserError(f"{path}: column {name!r} is missing; {did_you_mean(name, columns.names)}")
        kind = columns.field(name).type
        if not fits(kind):
            raise UserError(f"{path}: column {name!r} is {kind}, expected {expected}; prepare the data again")

    for feature in schema.categorical:
        if feature.multi_valued:
            check(feature.name, _is_integer_list, "list<int64> (the feature is multi-valued)")
            if feature.weighted:
                check(feature.weights_column, _is_float_list, "list<float> (the feature is weighted)")
        else:
            check(feature.name, pa.types.is_integer, "int64")
    for name in schema.numeric:
        check(name, lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind), "float32")
    for name in schema.predicted if schema.labelled else ():
        check(name, lambda kind: pa.types.is_boolean(kind) or pa.types.is_primitive(kind), "0 or 1")
    for name in schema.row_weights:
        check(name, pa.types.is_primitive, "float32")


def _is_integer_list(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)


def _is_float_list(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_floating(kind.value_type)


def find_defects(batch: pa.RecordBatch, schema: Schema) -> Iterator[Defect]:
    """All defects of a record batch, in schema order."""
    for feature in schema.categorical:
        column = batch.column(feature.name)
        yield from _nulls(feature.name, column)
        bad = _lists_outside(column, feature) if feature.multi_valued else _outside(column, feature)
        if bad is not None:
            yield bad
        if feature.weighted:
            yield from _bad_weights(batch.column(feature.weights_column), column, feature)
    for name in schema.numeric:
        column = batch.column(name)
        yield from _nulls(name, column)
        finite = np.isfinite(as_numbers(column, np.float32))
        yield from _defect(name, ~finite, column, "a finite number")
    for name in schema.predicted:
        column, optional = batch.column(name), name in schema.optional
        if not optional:
            yield from _nulls(name, column)
        labels = as_numbers(column, np.float32)
        bad = (labels != 0) & (labels != 1)
        yield from _defect(name, bad, column, "0, 1 or null" if optional else "0 or 1")
    for name in schema.row_weights:
        column = batch.column(name)
        yield from _nulls(name, column)
        weights = as_numbers(column, np.float32)
        yield from _defect(name, ~(np.isfinite(weights) & (weights >= 0)), column, "a finite number of at least 0")


def as_numbers(column: pa.Array, kind: type[np.generic], absent: float = 0) -> NDArray[Any]:
    """The column as a NumPy vector of this type.

    Args:
        absent: what a null becomes; 0, which is flagged as a null.
    """
    if column.null_count and absent != 0:
        column = column.cast(pa.float64())
    if column.null_count:
        column = pc.fill_null(column, pa.scalar(absent).cast(column.type))
    with np.errstate(over="ignore"):  # a float64 too large for float32 becomes inf, which is flagged
        return column.to_numpy(zero_copy_only=False).astype(kind, copy=False)


def _defect(name: str, rows: Mask, column: pa.Array, expected: str) -> Iterator[Defect]:
    if rows.any():
        yield Defect(name, rows, column[int(rows.argmax())].as_py(), expected)


def _nulls(name: str, column: pa.Array) -> Iterator[Defect]:
    if column.null_count:
        yield from _defect(name, column.is_null().to_numpy(zero_copy_only=False), column, "present")


def _bad_ids(values: pa.Array, feature: CategoricalFeature) -> Mask:
    """Compared in the column's own type: an unsigned 64-bit id must not wrap into range."""
    numbers = values.to_numpy(zero_copy_only=False) if not values.null_count else as_numbers(values, np.int64)
    return (numbers < 0) | (numbers >= feature.rows)


def _expected_id(feature: CategoricalFeature) -> str:
    return f"an id in [0, {feature.rows})"


def _outside(column: pa.Array, feature: CategoricalFeature) -> Defect | None:
    return next(_defect(feature.name, _bad_ids(column, feature), column, _expected_id(feature)), None)


def _lists_outside(column: pa.Array, feature: CategoricalFeature) -> Defect | None:
    values = column.flatten()  # leaves out null lists, and what lies outside a slice
    bad = _bad_ids(values, feature)
    if values.null_count:
        bad |= values.is_null().to_numpy(zero_copy_only=False)
    if not bad.any():
        return None
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    rows = np.zeros(len(column), bool)
    rows[np.repeat(np.arange(len(column)), lengths)[bad]] = True
    return Defect(feature.name, rows, values[int(bad.argmax())].as_py(), _expected_id(feature))


def _bad_weights(column: pa.Array, ids: pa.Array, feature: CategoricalFeature) -> Iterator[Defect]:
    """Another number of weights than of ids, or one that is not finite in float32."""
    name = feature.weights_column
    yield from _nulls(name, column)
    lengths, wanted = (pc.fill_null(pc.list_value_length(c), 0).to_numpy(zero_copy_only=False) for c in (column, ids))
    there = column.is_valid().to_numpy(zero_copy_only=False)
    yield from _defect(name, there & (lengths != wanted), column, f"as many weights as {feature.name} has ids")
    finite = np.isfinite(as_numbers(column.flatten(), np.float32))
    rows = np.zeros(len(column), bool)
    rows[np.repeat(np.arange(len(column)), lengths)[~finite]] = True
    yield from _defect(name, rows, column, "finite numbers")


def check_equally_long(first: str, other: str, lengths: NDArray[Any], its: NDArray[Any], rows: NDArray[Any]) -> None:
    """Two lists have as many values in every example.

    Args:
        lengths, its: whole numbers [B], of both.
        rows: [B], what an example is called, counted from 0.

    Raises:
        UserError: names the first example in which they have not.
    """
    differ = lengths != its
    if not differ.any():
        return
    at = int(differ.argmax())
    raise UserError(
        f"row {rows[at]} (from 0) has {lengths[at]} values of {first} and {its[at]} of {other}: features of one "
        "model.sequences entry share positions, so that their lists must be equally long; prepare them so, or give "
        "each an entry of its own"
    )


def check_batch(batch: Batch, schema: Schema, together: Sequence[Sequence[str]] = ()) -> None:
    """Raise a UserError for a user's batch that does not fit the schema; rows of a cache are checked already.

    A lookup does not check ids: past a table's end is the next table.

    Args:
        together: lists that must be equally long in every example.
    """
    if batch.numeric.shape != (batch.size, len(schema.numeric)):
        raise UserError(
            f"batch.numeric is {list(batch.numeric.shape)}, expected [{batch.size}, {len(schema.numeric)}]: a column "
            f"for each of {list(schema.numeric)}"
        )
    for feature in schema.categorical:
        if feature.name not in batch.ids:
            raise UserError(f"batch.ids misses {feature.name!r}; it has {', '.join(batch.ids) or 'nothing'}")
        ids = batch.ids[feature.name]
        for what, there, wanted in (
            ("lengths", ids.lengths is not None, feature.multi_valued),
            ("weights", ids.weights is not None, feature.weighted),
        ):
            if there != wanted:
                has = f"has {'no ' * (not there)}{what}, expected {'some' if wanted else 'none'}"
                raise UserError(f"batch.ids[{feature.name!r}] {has}, as the schema says")
    ends = [of.values.aminmax() for f in schema.categorical if (of := batch.ids[f.name]).values.numel()]
    filled = [feature for feature in schema.categorical if batch.ids[feature.name].values.numel()]
    found = torch.stack([torch.stack(pair) for pair in ends]).tolist() if ends else []  # one wait for the device
    for feature, (least, most) in zip(filled, found, strict=True):
        if least < 0 or most >= feature.rows:
            wrong = least if least < 0 else most
            raise UserError(f"batch.ids[{feature.name!r}] holds {wrong}: expected {_expected_id(feature)}")
    for first, *others in together:
        for other in others:
            lengths, its = (batch.ids[name].lengths for name in (first, other))
            assert lengths is not None and its is not None, "lists have lengths"
            check_equally_long(first, other, lengths.cpu().numpy(), its.cpu().numpy(), np.arange(batch.size))
