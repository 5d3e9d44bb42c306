"""People's own CSV, TSV or parquet files in units of work: what cannot be used is named by file, row and column.

A unit is a part of a file that one process reads by itself: a range of whole rows of plain TSV or CSV, some row groups
of parquet, or a file that can only be read from its beginning (gzip). Units follow from the files alone, never from the
number of processes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megarec.data.preparation import csv_cuts
from megarec.data.preparation.table_spec import TableSpec
from megarec.data.preparation.text_files import BYTE_ORDER_MARK, COUNTED, DELIMITERS, BadRow, TextFile, kind_of
from megarec.errors import UserError, did_you_mean

UNIT_BYTES = 1 << 26
UNIT_ROWS = 1 << 18
_PARQUET_ROWS = 1 << 16
_FEW_ROWS = 256  # rows among which a bad one is looked for by itself
Made = TypeVar("Made")


class RowRefused(UserError):
    """A row of a part that cannot be used.

    Attributes:
        index: of the row in the part.
    """

    def __init__(self, index: int, bad: BadRow) -> None:
        super().__init__(bad.what)
        self.index = index
        self.bad = bad


@dataclass(frozen=True)
class Part:
    """Some rows of a file.

    Attributes:
        numbers: int64 [n], the number of each of them in the unit, from 0.
    """

    path: Path
    rows: pa.RecordBatch
    numbers: NDArray[np.int64]

    def fail(self, row: int, column: str, value: Any, expected: str) -> NoReturn:
        raise RowRefused(row, BadRow(int(self.numbers[row]), column, f"{column}={value!r}, expected {expected}"))

    def without(self, row: int) -> "Part":
        """All rows but one."""
        return self.only(np.arange(len(self.numbers)) != row)

    def only(self, keep: NDArray[np.bool_]) -> "Part":
        """Some of the rows."""
        return Part(self.path, self.rows.filter(pa.array(keep)), self.numbers[keep])

    def cut(self, rows: int) -> Iterator["Part"]:
        """Parts of at most so many rows."""
        for start in range(0, len(self.numbers), rows):
            yield Part(self.path, self.rows.slice(start, rows), self.numbers[start : start + rows])


@dataclass(frozen=True)
class Unit:
    """A part of a file that one process reads by itself.

    Attributes:
        size: bytes of the file that it is.
        span: (first byte, byte after the last) of plain text; None: all of the file.
        names: of the columns, where the unit does not begin with them.
        groups: row groups of parquet.
    """

    path: Path
    split: str
    size: int
    span: tuple[int, int] | None = None
    names: tuple[str, ...] | None = None
    groups: tuple[int, ...] | None = None

    @property
    def counted(self) -> str:
        """How rows are numbered, for messages."""
        return "from 0" if self.groups is not None else COUNTED


def units_of(path: Path, split: str, spec: TableSpec) -> list[Unit]:
    """The units of a file, in order.

    Raises:
        UserError: the file cannot be read.
    """
    suffix, compressed = kind_of(path, spec.delimiter)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file; a pipe cannot be read again after a stop: write it to a file")
    with readable(path):
        size = path.stat().st_size
        if suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            return [
                Unit(path, split, size * sum(groups[i] for i in some) // max(sum(groups), 1), groups=some)
                for some in _together(groups)
            ]
        if compressed or size <= UNIT_BYTES:
            return [Unit(path, split, size)]
        cuts = _row_starts(path, size, _text(path, spec))
        names = tuple(spec.columns) if not spec.header else _names(path, spec)
        spans = zip([0, *cuts], [*cuts, size], strict=True)
        return [
            Unit(path, split, end - start, (start, end), names if start or not spec.header else None)
            for start, end in spans
        ]


def columns_of(path: Path, spec: TableSpec) -> list[str]:
    """The names of a file's columns; where the file does not say them, those that its first row has values for.

    Raises:
        UserError: the file cannot be read.
    """
    suffix, _ = kind_of(path, spec.delimiter)
    with readable(path):
        if suffix == ".parquet":
            return list(pq.read_schema(path).names)
        text = replace(_text(path, spec), names=None)
        found = next((names for names, _ in text.blocks(lambda names: None)), [])
    if spec.header:
        return found
    without = [name for name in spec.columns if name not in spec.labels]
    return without if len(found) == len(without) else list(spec.columns)


def _together(groups: list[int]) -> list[tuple[int, ...]]:
    """Numbers of neighbouring row groups with at least UNIT_ROWS rows together."""
    found: list[tuple[int, ...]] = []
    some: tuple[int, ...] = ()
    rows = 0
    for number, count in enumerate(groups):
        some, rows = (*some, number), rows + count
        if rows >= UNIT_ROWS:
            found.append(some)
            some, rows = (), 0
    return [*found, some] if some or not found else found


def _row_starts(path: Path, size: int, text: TextFile) -> list[int]:
    """Where a row starts, about every UNIT_BYTES; none where no line ends in a line feed."""
    found: list[int] = []
    with path.open("rb") as file:
        if text.quotes:
            file.seek(len(BYTE_ORDER_MARK) if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0)
            return csv_cuts.row_starts(file, size, text.delimiter, UNIT_BYTES)
        if b"\n" not in file.read(1 << 22):
            return []
        for target in range(UNIT_BYTES, size, UNIT_BYTES):
            if found and found[-1] >= target:
                continue
            file.seek(target - 1)
            file.readline(1 << 25)
            if file.tell() < size:
                found.append(file.tell())
    return found


def _names(path: Path, spec: TableSpec) -> tuple[str, ...]:
    for names, _ in _text(path, spec).blocks(lambda names: _check_columns(path, names, spec)):
        return tuple(names)
    raise AssertionError("a file above UNIT_BYTES has a block")


def _text(path: Path, spec: TableSpec, unit: Unit | None = None) -> TextFile:
    suffix, compressed = kind_of(path, spec.delimiter)
    names = None if spec.header else list(spec.columns)
    if unit is not None and unit.names is not None:
        names = list(unit.names)
    return TextFile(path, spec.delimiter or DELIMITERS[suffix], names, compressed, unit.span if unit else None)


def read_unit(unit: Unit, spec: TableSpec, bad: list[BadRow]) -> Iterator[tuple[Part, int]]:
    """The rows of a unit, in order, in bounded memory, and how many rows of the unit have been read so far.

    Args:
        bad: takes rows that are not whole.

    Raises:
        UserError: the file cannot be read, or columns are missing or undeclared.
    """
    used = [name for name, column in spec.columns.items() if column.type != "ignored"]
    read = 0
    with readable(unit.path):
        if unit.groups is not None:
            with pq.ParquetFile(unit.path) as file:
                _check_columns(unit.path, file.schema_arrow.names, spec)
                for batch in file.iter_batches(_PARQUET_ROWS, list(unit.groups), columns=used, use_threads=False):
                    numbers = np.arange(read, read + len(batch), dtype=np.int64)
                    read += len(batch)
                    yield Part(unit.path, batch, numbers), read
            return
        text = _text(unit.path, spec, unit)
        for names, block in text.blocks(lambda names: _check_columns(unit.path, names, spec)):
            rows = text.rows(block, names, used)
            bad += [row._replace(row=row.row + read) for row in rows.bad]
            numbers = rows.numbers + read
            read += rows.read
            yield Part(unit.path, rows.table, numbers), read


def usable(
    part: Part, made: Callable[[Part], Made], bad: list[BadRow], most_bad: int | None
) -> Iterator[tuple[Part, Made]]:
    """(rows, what is made of them) of the rows that can be used; the others are noted in `bad`.

    Args:
        made: raises RowRefused for the first row that it cannot use.
        most_bad: bad rows after which reading on is in vain; None: never.
    """
    try:
        yield part, made(part)
        return
    except RowRefused as refused:
        if most_bad is not None and len(bad) >= most_bad:
            bad.append(refused.bad)
            return
    for few in part.cut(_FEW_ROWS):
        while len(few.numbers):
            try:
                yield few, made(few)
                break
            except RowRefused as refused:
                bad.append(refused.bad)
                few = few.without(refused.index)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Inside, whatever makes a file unreadable is a `UserError` that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _check_columns(path: Path, found: list[str], spec: TableSpec) -> None:
    for name in found:
        if found.count(name) > 1:
            raise UserError(f"{path}: column {name!r} appears {found.count(name)} times")
        if name not in spec.columns:
            raise UserError(
                f"{path}: column {name!r} is not declared; {did_you_mean(name, spec.columns)} "
                "(unused columns are declared with type 'ignored')"
            )
    for name, column in spec.columns.items():
        if name not in found and column.type != "ignored":  # an ignored column may be in some files only
            raise UserError(f"{path}: column {name!r} is missing; {did_you_mean(name, found)}")
