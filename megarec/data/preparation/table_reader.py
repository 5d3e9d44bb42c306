"""Users' own files in units of work: errors name file, row and column.

A unit is a part of a file that one process reads by itself: a range of whole rows of plain TSV, CSV or JSON, some row
groups of parquet or batches of Arrow, or a file that can only be read from its beginning (gzip and zstd; Arrow's
streams). Units follow from the files alone, never from the number of processes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megarec.data.preparation import arrow_files, csv_cuts, json_lines
from megarec.data.preparation.formats import BYTE_ORDER_MARK, DELIMITERS, is_utf8, kind_of
from megarec.data.preparation.hub import HubSplit
from megarec.data.preparation.json_lines import JsonRows
from megarec.data.preparation.table_spec import TableSpec
from megarec.data.preparation.text_files import COUNTED, BadRow, TextFile, are_names, value_shown
from megarec.errors import UserError, did_you_mean

UNIT_BYTES = 1 << 26
UNIT_ROWS = 1 << 18
_FEW_LINES = 1000
_WITHOUT_NAMES = "from 0"
_FEW_ROWS = 256  # rows among which a bad one is searched one by one
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
        null_words: texts that count as missing.
    """

    path: Path
    rows: pa.RecordBatch
    numbers: NDArray[np.int64]
    null_words: tuple[str, ...] = ()

    def fail(self, row: int, column: str, value: Any, expected: str) -> NoReturn:
        raise RowRefused(
            row, BadRow(int(self.numbers[row]), column, f"{column}={value_shown(value)}, expected {expected}")
        )

    def without(self, row: int) -> "Part":
        """All rows but one."""
        return self.only(np.arange(len(self.numbers)) != row)

    def only(self, keep: NDArray[np.bool_]) -> "Part":
        """Some of the rows."""
        return replace(self, rows=self.rows.filter(pa.array(keep)), numbers=self.numbers[keep])

    def cut(self, rows: int) -> Iterator["Part"]:
        """Parts of at most that many rows."""
        for start in range(0, len(self.numbers), rows):
            yield replace(self, rows=self.rows.slice(start, rows), numbers=self.numbers[start : start + rows])


@dataclass(frozen=True)
class Unit:
    """A part of a file that one process reads by itself.

    Attributes:
        size: bytes of the file that it is.
        span: (first byte, byte after the last) of plain text; None: all of the file.
        names: of the columns, where the unit does not begin with them.
        groups: row groups of parquet, batches of Arrow.
        counted: how rows are numbered, for messages.
        source: a split that `datasets` opens, in place of a file, and `shard` of it.
    """

    path: Path
    split: str
    size: int
    span: tuple[int, int] | None = None
    names: tuple[str, ...] | None = None
    groups: tuple[int, ...] | None = None
    counted: str = COUNTED
    source: HubSplit | None = None
    shard: int = 0


def units_of(path: Path | HubSplit, split: str, spec: TableSpec) -> list[Unit]:
    """The units of a file, or of a split of a data set, in order.

    Raises:
        UserError: it cannot be read.
    """
    if isinstance(path, HubSplit):
        count, size = path.shards, path.size
        part = UNIT_BYTES if size is None else size // count
        return [
            Unit(path.path, split, part, counted=_WITHOUT_NAMES, source=path, shard=shard) for shard in range(count)
        ]
    kind = kind_of(path, spec.delimiter)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a regular file; a pipe cannot be read again after a stop: write it to a file")
    with readable(path):
        size = path.stat().st_size
        if kind.format in ("parquet", "arrow"):
            groups = arrow_files.groups_of(path, kind.format, size, UNIT_BYTES, UNIT_ROWS)
            return [Unit(path, split, part, groups=some, counted=_WITHOUT_NAMES) for some, part in groups]
        counted = _WITHOUT_NAMES if kind.format == "json" else COUNTED
        if kind.compression or size <= UNIT_BYTES or not is_utf8(spec.encoding):
            return [Unit(path, split, size, counted=counted)]
        cuts = _row_starts(path, size, _text(path, spec))
        names = () if kind.format == "json" else _names(path, spec)
        spans = zip([0, *cuts], [*cuts, size], strict=True)
        return [
            Unit(path, split, end - start, (start, end), names if start else None, counted=counted)
            for start, end in spans
        ]


def columns_of(path: Path | HubSplit, spec: TableSpec) -> list[str]:
    """The names of a file's columns; where the file has none, those that its first row has values for.

    Raises:
        UserError: the file cannot be read.
    """
    if isinstance(path, HubSplit):
        return path.names()
    kind = kind_of(path, spec.delimiter)
    with readable(path):
        if kind.format in ("parquet", "arrow"):
            return arrow_files.names_of(path, kind.format)
        text = _text(path, spec)
        if kind.format == "json":
            _, block = next(text.blocks(lambda names: None), ([], b""))
            return json_lines.sample(text, block, _FEW_LINES).schema.names if block.strip() else list(spec.columns)
        found = next((names for names, _ in replace(text, names=None).blocks(lambda names: None)), [])
    if spec.header is True or (text.unsure and are_names(found, spec.columns)):
        return found
    without = [name for name in spec.columns if name not in spec.labels]
    return without if len(found) == len(without) else list(spec.columns)


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
    kind, span = kind_of(path, spec.delimiter), unit.span if unit else None
    if kind.format == "json":
        return TextFile(path, "\t", [], kind.compression, spec.encoding, span)
    delimiter = spec.delimiter or DELIMITERS[kind.suffix]
    if unit is not None and unit.names is not None:
        return TextFile(path, delimiter, list(unit.names), span=span)
    names = None if spec.header is True else list(spec.columns)
    return TextFile(path, delimiter, names, kind.compression, spec.encoding, span, spec.header == "auto")


def read_unit(unit: Unit, spec: TableSpec, bad: list[BadRow]) -> Iterator[tuple[Part, int]]:
    """The rows of a unit, in order, in bounded memory, and how many rows of the unit have been read so far.

    Args:
        bad: takes rows that are not whole.

    Raises:
        UserError: the file cannot be read, or columns are missing or undeclared.
    """
    used = [name for name, column in spec.columns.items() if column.type != "ignored"]
    read = 0

    def check(names: list[str]) -> None:
        _check_columns(unit.path, names, spec)

    with readable(unit.path):
        if (batches := _batches(unit, spec, used, check)) is not None:
            for batch in batches:
                numbers = np.arange(read, read + len(batch), dtype=np.int64)
                read += len(batch)
                yield Part(unit.path, batch, numbers, tuple(spec.null_words)), read
            return
        text = _text(unit.path, spec, unit)
        json_rows = JsonRows(text, spec, used) if unit.counted == _WITHOUT_NAMES else None
        for names, block in text.blocks((lambda names: None) if json_rows else check):
            rows = json_rows.rows(block) if json_rows else text.rows(block, names, used)
            bad += [row._replace(row=row.row + read) for row in rows.bad]
            numbers = rows.numbers + read
            read += rows.read
            yield Part(unit.path, rows.table, numbers, tuple(spec.null_words)), read


def _batches(
    unit: Unit, spec: TableSpec, used: list[str], check: Callable[[list[str]], None]
) -> Iterator[pa.RecordBatch] | None:
    """The rows of a unit that is not text."""
    if unit.source is not None:
        return unit.source.batches(unit.shard, used, check)
    kind = kind_of(unit.path, spec.delimiter)
    return (
        None
        if kind.format in ("text", "json")
        else arrow_files.batches(unit.path, kind.format, unit.groups, used, check)
    )


def usable(
    part: Part, made: Callable[[Part], Made], bad: list[BadRow], most_bad: int | None
) -> Iterator[tuple[Part, Made]]:
    """(rows, what is made of them) of the rows that can be used; the others are noted in `bad`.

    Args:
        made: raises RowRefused for the first row that it cannot use.
        most_bad: bad rows after which reading stops; None: never.
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
    """Inside, any read error of a file is a `UserError` that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _check_columns(path: Path, found: list[str], spec: TableSpec) -> None:
    for name in found:
        if found.count(name) > 1:
            raise UserError(f"{path}: column {name!r} appears {found.count(name)} times")
        if name not in spec.columns:
            hint = "unused columns are declared with type 'ignored'"
            if len(found) == 1 and path.name.lower().endswith((".txt", ".txt.gz", ".txt.zst")) and not spec.delimiter:
                hint = "values of a .txt are separated by tabs, unless the spec has a delimiter"
            raise UserError(f"{path}: column {name!r} is not declared; {did_you_mean(name, spec.columns)} ({hint})")
    for name, column in spec.columns.items():
        if name not in found and column.type != "ignored":  # an ignored column may be in some files only
            raise UserError(f"{path}: column {name!r} is missing; {did_you_mean(name, found)}")
