"""Columns that become several features: a vector its numbers, a moment its hour and weekday.

All that follows sees features alone (`TableSpec.features`), each as if it had been a column of the files.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megarec.data.preparation.table_reader import Part
from megarec.data.preparation.table_spec import Calendar, TableSpec, Vector
from megarec.data.preparation.text_files import BadRow, value_shown
from megarec.data.preparation.values import lengths_of, lists_of, plain
from megarec.errors import UserError

_NUMBERS = 1 << 22  # of a part at once


def expand(part: Part, spec: TableSpec, bad: list[BadRow]) -> Iterator[Part]:
    """The rows of a part with the features of a spec in place of its columns, in parts of bounded size.

    Args:
        bad: takes rows whose columns cannot be split.

    Raises:
        UserError: a column is of a type that does not fit.
    """
    wide = sum(column.length for column in spec.columns.values() if isinstance(column, Vector))
    if not wide and not any(isinstance(column, Calendar) for column in spec.columns.values()):
        yield part
        return
    rows = max(1, _NUMBERS // max(wide, 1))
    for some in part.cut(rows) if len(part.numbers) > rows else [part]:
        yield _expanded(some, spec, bad)


def _expanded(part: Part, spec: TableSpec, bad: list[BadRow]) -> Part:
    keep = np.ones(len(part.numbers), bool)

    def refuse(rows: NDArray[np.bool_], name: str, expected: str) -> None:
        for row in np.flatnonzero(rows & keep):
            value = part.rows.column(name)[int(row)].as_py()
            bad.append(BadRow(int(part.numbers[row]), name, f"{name}={value_shown(value)}, expected {expected}"))
        keep[rows] = False

    moments: dict[str, pa.Array] = {}
    for name, column in spec.columns.items():
        if isinstance(column, Vector):
            lengths = lengths_of(lists_of(part, name, column.separator))
            wrong = lengths != column.length
            if column.missing is not None:
                wrong &= lengths > 0
            refuse(wrong, name, f"{column.length} numbers, as columns.{name}.length says")
        elif isinstance(column, Calendar):
            moments[name], wrong = _moments(part, name, column)
            refuse(wrong, name, f"a moment written as {column.format!r}, which columns.{name}.format says")
    left = part.only(keep) if not keep.all() else part
    found: dict[str, pa.Array] = {}
    for name, column in spec.columns.items():
        if isinstance(column, Vector):
            found |= zip(column.features(name), _numbers(left, name, column), strict=True)
        elif isinstance(column, Calendar):
            times = moments[name].filter(pa.array(keep))
            found |= zip(column.features(name), (pc.hour(times), pc.day_of_week(times)), strict=True)
        elif column.type != "ignored":
            found[name] = left.rows.column(name)
    return replace(left, rows=pa.RecordBatch.from_pydict(found))


def _numbers(part: Part, name: str, column: Vector) -> list[pa.Array]:
    """By place in the vector, the values of all rows; those of a row without any are missing."""
    lists = lists_of(part, name, column.separator)
    elements = plain(part, lists.flatten())
    there = np.flatnonzero(lengths_of(lists))
    places = np.full(len(lists), -1, np.int64)
    places[there] = np.arange(len(there))
    try:
        numbers = elements.cast(pa.float64(), safe=not pa.types.is_integer(elements.type))
        matrix = np.full((len(lists), column.length), np.nan)
        matrix[there] = numbers.to_numpy(zero_copy_only=False).reshape(len(there), column.length)
        return [pa.array(values) for values in np.ascontiguousarray(matrix.T)]
    except pa.ArrowInvalid:  # some text is not a number: the rule of each feature says which
        starts = pa.array(places * column.length, mask=places < 0)
        return [elements.take(pc.add(starts, place)) for place in range(column.length)]
    except pa.ArrowNotImplementedError as error:
        raise UserError(f"{part.path}: column {name!r} has {elements.type}, expected numbers") from error


def _moments(part: Part, name: str, column: Calendar) -> tuple[pa.Array, NDArray[np.bool_]]:
    """The moments of a column in UTC, a missing one as null; and which values are none."""
    values = plain(part, part.rows.column(name))
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        return values.cast(pa.timestamp("s"), safe=False), np.zeros(len(values), bool)
    if not pa.types.is_string(values.type) and not pa.types.is_integer(values.type):
        raise UserError(f"{part.path}: column {name!r} is {values.type}, expected text, integers or timestamps")
    text = values.cast(pa.string()).dictionary_encode()
    distinct = pc.if_else(pc.equal(text.dictionary, ""), None, text.dictionary)
    read = pc.strptime(distinct, format=column.format, unit="s", error_is_null=True)
    if "%z" not in column.format:  # strptime takes February 30 for March; written again it is another text
        again = pc.strftime(read, format=column.format)
        read = pc.if_else(pc.equal(_plain_digits(again), _plain_digits(distinct)), read, None)
    wrong = pc.and_(distinct.is_valid(), read.is_null()).take(text.indices)
    return read.take(text.indices), pc.fill_null(wrong, False).to_numpy(zero_copy_only=False)


def _plain_digits(texts: pa.Array) -> pa.Array:
    """Texts of moments without what strptime does not look at: zeros before numbers, spaces, upper case."""
    return pc.replace_substring_regex(pc.utf8_lower(texts), r"\s+|\b0+([0-9])", r"\1")
