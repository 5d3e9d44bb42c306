"""Stream people's own CSV, TSV or parquet files; what cannot be used is named by file, row and column."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megarec.data.sources.table_spec import Categorical, MultiValued, Numeric, TableSpec
from megarec.errors import UserError, did_you_mean

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_CSV_BLOCK_BYTES = 1 << 22  # Arrow reads up to 32 blocks ahead: 128 MiB at most
_PARQUET_ROWS = 1 << 16


@dataclass(frozen=True)
class Part:
    """Some consecutive rows of a file.

    Attributes:
        start: the number of the first of them in the file, from 0.
    """

    path: Path
    start: int
    rows: pa.RecordBatch

    def fail(self, row: int, column: str, value: Any, expected: str) -> NoReturn:
        counted = "from 0, header not counted" if self.path.suffix in _DELIMITERS else "from 0"
        raise UserError(f"{self.path}: row {self.start + row} ({counted}): {column}={value!r}, expected {expected}")


def read_parts(paths: list[Path], spec: TableSpec) -> Iterator[Part]:
    """All rows of the files of a split, in order, in bounded memory.

    Raises:
        UserError: a file cannot be read, columns are missing or undeclared, or there is no row at all.
    """
    rows = 0
    for path in paths:
        start = 0
        for batch in _record_batches(path, spec):
            yield Part(path, start, batch)
            start += len(batch)
        rows += start
    if rows == 0:
        raise UserError(f"{', '.join(map(str, paths))}: no rows; every split needs some")


def _record_batches(path: Path, spec: TableSpec) -> Iterator[pa.RecordBatch]:
    if path.suffix not in (*_DELIMITERS, ".parquet"):
        raise UserError(f"{path}: suffix {path.suffix!r}, expected .csv, .tsv or .parquet")
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                _check_columns(path, file.schema_arrow.names, spec)
                used = [name for name, column in spec.columns.items() if column.type != "ignored"]
                yield from file.iter_batches(_PARQUET_ROWS, columns=used)
        else:
            with _open_text(path, spec) as reader:
                _check_columns(path, reader.schema.names, spec)
                yield from reader
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _open_text(path: Path, spec: TableSpec) -> pyarrow.csv.CSVStreamingReader:
    names = list(spec.columns)
    return pyarrow.csv.open_csv(
        path,
        pyarrow.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES, column_names=None if spec.header else names),
        pyarrow.csv.ParseOptions(delimiter=_DELIMITERS[path.suffix]),
        pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),  # as text: a bad value can then be shown as it stands
            null_values=[""],
            strings_can_be_null=True,
        ),
    )


def _check_columns(path: Path, found: list[str], spec: TableSpec) -> None:
    for name in found:
        if found.count(name) > 1:
            raise UserError(f"{path}: column {name!r} appears {found.count(name)} times")
        if name not in spec.columns:
            raise UserError(
                f"{path}: column {name!r} is not declared; {did_you_mean(name, spec.columns)} "
                "(unused columns are declared with type 'ignored')"
            )
    for name in spec.columns:
        if name not in found:
            raise UserError(f"{path}: column {name!r} is missing; {did_you_mean(name, found)}")


def id_values(part: Part, name: str, column: Categorical) -> pa.Array:
    """The column's values as string or int64 [n]; a missing value is null."""
    return _typed(part, name, part.rows.column(name), column.dtype, None)


def id_lists(part: Part, name: str, column: MultiValued) -> tuple[pa.Array, NDArray[np.int64]]:
    """The column's values as string or int64 [sum(lengths)], row after row, and lengths int64 [n]."""
    lists = _lists(part, name, column)
    owner = _owners(lists)
    values = lists.flatten()
    keep = _present(values)
    owner = owner[keep.to_numpy(zero_copy_only=False)]
    values = _typed(part, name, values.filter(keep), column.dtype, owner)
    return values, np.bincount(owner, minlength=len(lists)).astype(np.int64)


def weights(part: Part, name: str, of: str, column: MultiValued) -> NDArray[np.float32]:
    """The weights of the values that `id_lists` returns for the column `of`: float32 [sum(lengths)]."""
    ids, lists = _lists(part, of, column), _lists(part, name, column)
    wanted, found = (
        pc.fill_null(pc.list_value_length(given), 0).to_numpy(zero_copy_only=False) for given in (ids, lists)
    )
    if (wanted != found).any():
        row = int((wanted != found).argmax())
        value = part.rows.column(name)[row].as_py()
        part.fail(row, name, value, f"{wanted[row]} weights, one for each value of {of!r}")
    keep = _present(ids.flatten())
    values, owner = lists.flatten().filter(keep), _owners(ids)[keep.to_numpy(zero_copy_only=False)]
    numbers = _cast(part, name, values, pa.float64(), "numbers", owner).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        result = numbers.astype(np.float32)
    if not np.isfinite(result).all():
        first = int(np.isfinite(result).argmin())
        part.fail(int(owner[first]), name, values[first].as_py(), "finite numbers")
    return result


def _lists(part: Part, name: str, column: MultiValued) -> pa.Array:
    """A column as lists: text is cut at the separator."""
    lists = part.rows.column(name)
    if pa.types.is_dictionary(lists.type):
        lists = lists.dictionary_decode()
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        if not (pa.types.is_string(lists.type) or pa.types.is_large_string(lists.type)):
            raise UserError(f"{part.path}: column {name!r} is {lists.type}, expected text or a list")
        lists = pc.split_pattern(lists, column.separator)
    return lists


def _owners(lists: pa.Array) -> NDArray[np.int64]:
    """The row of every element."""
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return np.repeat(np.arange(len(lists)), counts)


def _present(values: pa.Array) -> pa.Array:
    """Which elements of lists are there."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return pc.fill_null(pc.not_equal(values, ""), False)
    return values.is_valid()


def numbers(part: Part, name: str, column: Numeric) -> NDArray[np.float32]:
    """The column as float32 [n], missing ones filled where the column says with what."""
    values = part.rows.column(name)
    found = _cast(part, name, values, pa.float64(), "a number", None).to_numpy(zero_copy_only=False)
    missing = np.isnan(found)
    if missing.any():
        if column.missing is None:
            row = int(missing.argmax())
            part.fail(row, name, values[row].as_py(), f"a number (or columns.{name}.missing in the spec, to fill in)")
        found = np.where(missing, column.missing, found)
    if column.log:
        found = np.sign(found) * np.log1p(np.abs(found))
    with np.errstate(over="ignore"):
        result = found.astype(np.float32)
    if not np.isfinite(result).all():
        row = int(np.isfinite(result).argmin())
        part.fail(row, name, values[row].as_py(), "a finite number")
    return result


def labels(part: Part, name: str) -> NDArray[np.int8]:
    """The label column as int8 [n], 0 or 1."""
    values = part.rows.column(name)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    found = _cast(part, name, values, pa.float64(), "0 or 1", None).to_numpy(zero_copy_only=False)
    bad = (found != 0) & (found != 1)
    if bad.any():
        row = int(bad.argmax())
        part.fail(row, name, values[row].as_py(), "0 or 1")
    return found.astype(np.int8)


def _typed(part: Part, name: str, values: pa.Array, dtype: str, owner: NDArray[np.int64] | None) -> pa.Array:
    """Ids as string or int64; `owner` is the row of every value, None when value i is row i's."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type):
        if dtype == "string":
            raise UserError(f"{part.path}: column {name!r} is {values.type}, which names no category; dtype 'integer'?")
        values = pc.if_else(pc.is_nan(values), None, values)  # pandas writes integers with gaps as floats
    if dtype == "integer":
        return _cast(part, name, values, pa.int64(), "an integer", owner)
    return _cast(part, name, values, pa.string(), "text", owner)


def _cast(
    part: Part, name: str, values: pa.Array, kind: pa.DataType, expected: str, owner: NDArray[np.int64] | None
) -> pa.Array:
    try:
        return values.cast(kind)
    except pa.ArrowNotImplementedError as error:
        raise UserError(f"{part.path}: column {name!r} is {values.type}, expected {expected}") from error
    except pa.ArrowInvalid:
        bad = _first_failing(values, kind)
        part.fail(bad if owner is None else int(owner[bad]), name, values[bad].as_py(), expected)


def _first_failing(values: pa.Array, kind: pa.DataType) -> int:
    """The first value that cannot be cast, by bisection."""
    start, length = 0, len(values)
    while length > 1:
        half = length // 2
        try:
            values.slice(start, half).cast(kind)
            start, length = start + half, length - half
        except pa.ArrowInvalid:
            length = half
    return start
