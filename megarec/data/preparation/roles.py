"""Columns that are not features: the weight of a row, its group, its time, and its split."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megarec.data.preparation.table_reader import Part
from megarec.data.preparation.table_spec import Categorical, Group, SplitColumn
from megarec.data.preparation.text_files import first_failing
from megarec.data.preparation.values import as_float64, canonical_text, id_values, plain
from megarec.data.schema import SPLITS

_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_DAY = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"
_NO_ZONE = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9:.]+$"
_EXPECTED_TIME = "a number, or a date or time as 2020-01-31 or 2020-01-31T12:30:00"
_MICROSECONDS = pa.timestamp("us", "UTC")


def row_weights(part: Part, name: str) -> NDArray[np.float32]:
    """The weight of every row as float32 [n], 0 or more."""
    values = part.rows.column(name)
    with np.errstate(over="ignore"):
        found = as_float64(part, name, values, "a number of at least 0").astype(np.float32)
    good = np.isfinite(found) & (found >= 0)
    if not good.all():
        row = int(good.argmin())
        part.fail(row, name, values[row].as_py(), "a number of at least 0")
    return found


def group_ids(part: Part, name: str, column: Group) -> NDArray[np.int64]:
    """The group of every row as int64 [n]: an integer itself, the BLAKE2b-64 of a text."""
    values = id_values(part, name, Categorical(type="categorical", dtype=column.dtype))
    _check_present(part, name, values, "the id of a group")
    if column.dtype == "integer":
        return values.to_numpy(zero_copy_only=False)
    encoded = values.dictionary_encode()
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in encoded.dictionary.to_pylist()]
    numbers = np.array([int.from_bytes(digest, "little", signed=True) for digest in digests], np.int64)
    return numbers[encoded.indices.to_numpy(zero_copy_only=False)]


def times(part: Part, name: str) -> NDArray[np.float64]:
    """The time of every row as float64 [n]: numbers unchanged, dates and times in seconds since 1970 (UTC)."""
    values = plain(part, part.rows.column(name))
    if pa.types.is_string(values.type):
        found = _times_of_text(part, name, values)
    elif pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        per_second = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}
        stamps = values.cast(pa.timestamp("s")) if pa.types.is_date(values.type) else values
        found = pc.cast(stamps.cast(pa.int64()), pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        found = found / per_second[stamps.type.unit]
    else:
        found = as_float64(part, name, values, _EXPECTED_TIME)
    if not np.isfinite(found).all():
        row = int(np.isfinite(found).argmin())
        part.fail(row, name, values[row].as_py(), _EXPECTED_TIME)
    return found + 0.0  # -0 is 0


def _times_of_text(part: Part, name: str, values: pa.Array) -> NDArray[np.float64]:
    """Each value by itself decides what it is, so that no neighbour changes its meaning; NaN where it is missing."""
    is_number = pc.match_substring_regex(values, _NUMBER)
    numbers = pc.if_else(is_number, values, None).cast(pa.float64())
    words = pc.if_else(pc.or_(is_number, pc.equal(values, "")), None, values)
    words = pc.if_else(pc.match_substring_regex(words, _DAY), pc.binary_join_element_wise(words, "00:00Z", " "), words)
    words = pc.if_else(pc.match_substring_regex(words, _NO_ZONE), pc.binary_join_element_wise(words, "Z", ""), words)
    try:
        stamps = words.cast(_MICROSECONDS).cast(pa.int64())
    except pa.ArrowInvalid:
        row = first_failing(words, _MICROSECONDS)
        part.fail(row, name, values[row].as_py(), _EXPECTED_TIME)
    seconds = stamps.to_numpy(zero_copy_only=False).astype(np.float64) / 1e6
    return np.where(is_number.fill_null(False).to_numpy(False), numbers.to_numpy(zero_copy_only=False), seconds)


def split_places(part: Part, name: str, column: SplitColumn) -> NDArray[np.int64]:
    """Int64 [n], the index in SPLITS of the split of every row."""
    values = id_values(part, name, Categorical(type="categorical"))
    texts = canonical_text(pa.array([*column.values], pa.string()))
    found = pc.index_in(values, value_set=texts)
    _check_present(part, name, found, f"one of {', '.join(map(repr, column.values))}", part.rows.column(name))
    places = np.array([SPLITS.index(split) for split in column.values.values()], np.int64)
    return places[found.to_numpy(zero_copy_only=False)]


def _check_present(part: Part, name: str, found: pa.Array, expected: str, values: pa.Array | None = None) -> None:
    if found.null_count:
        row = int(found.is_null().to_numpy(zero_copy_only=False).argmax())
        part.fail(row, name, (found if values is None else values)[row].as_py(), expected)
