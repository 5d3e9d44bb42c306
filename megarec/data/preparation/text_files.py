"""CSV and TSV as blocks of whole rows, read exactly.

Tab-separated text has no quoting: every line is a row, a quote is an ordinary character. CSV is RFC 4180: a value
that begins with a quote ends with one, may hold commas and line breaks, and doubles the quotes in it; a quote within a
value that does not begin with one is a character. Either may begin with a byte-order mark.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from megarec.data.preparation import csv_cuts
from megarec.data.preparation.formats import BYTE_ORDER_MARK, UTF_8, is_utf8, open_text
from megarec.errors import UserError

COUNTED = "from 0, header not counted"
"""How rows of text are numbered, for messages."""
_BLOCK_BYTES = 1 << 22
_LONGEST_ROW = 1 << 24
_LONGEST_SHOWN = 200  # characters


@functools.cache
def _quoted_value(delimiter: str) -> re.Pattern[bytes]:
    """A value that begins with a quote, and the quote that ends it: the group is empty where the text ends first.

    The quantifiers give nothing back, so that the time is linear.
    """
    return re.compile(rb"(?:(?<=[\r\n" + re.escape(delimiter.encode()) + rb'])|\A)"(?:[^"]++|"")*+("?)')


def are_names(found: list[str], declared: Collection[str]) -> bool:
    """Whether a first row is one of names, if that is not sure: at least half of its values are declared."""
    return bool(found) and 2 * sum(name in declared for name in found) >= len(found)


class BadRow(NamedTuple):
    """A row that cannot be used.

    Attributes:
        row: its number, from 0, in the part of the file that was read.
        reason: the column, or the error of the row as a whole; bad rows are counted by it.
        what: the value seen and what was expected.
    """

    row: int
    reason: str
    what: str


class Rows(NamedTuple):
    """The rows of a block that are whole.

    Attributes:
        numbers: int64 [n], the index of each among the rows of the block.
        read: rows of the block, those that are not whole included.
    """

    table: pa.RecordBatch
    numbers: NDArray[np.int64]
    bad: list[BadRow]
    read: int


@dataclass(frozen=True)
class TextFile:
    """How a file of text is read.

    Attributes:
        names: of its columns where it has no line of names; None: its first row has them.
        compression: gzip, zstd or none.
        span: (first byte, byte after the last) of the whole rows to read; None: all.
        unsure: the first row is one of names if at least half of its values are among `names`.
    """

    path: Path
    delimiter: str
    names: list[str] | None
    compression: str | None = None
    encoding: str = UTF_8
    span: tuple[int, int] | None = None
    unsure: bool = False

    @property
    def quotes(self) -> bool:
        """Whether a value that begins with a quote ends with one."""
        return self.delimiter != "\t"

    @property
    def broken(self) -> str:
        """The reason by which rows are counted whose bytes are not text."""
        return "not UTF-8" if is_utf8(self.encoding) else f"not {self.encoding}"

    @property
    def expected(self) -> str:
        """What their bytes should be, and the remedy."""
        if is_utf8(self.encoding):
            return 'UTF-8; state the "encoding" in the spec ("latin-1"?)'
        return f"{self.encoding}, the encoding in the spec"

    def blocks(self, check: Callable[[list[str]], None]) -> Iterator[tuple[list[str], bytes]]:
        """The names of the columns and whole rows, in order, some MiB at a time; `rows` reads them.

        Args:
            check: is given the names of the columns once they are known.

        Raises:
            UserError: names the file and line of what cannot be read.
        """
        names = self.names
        known = names is not None and not self.unsure
        if known:
            check(names)  # type: ignore[arg-type]
        with open_text(self.path, self.compression, self.encoding, self.span[0] if self.span else 0) as file:
            for block in self._blocks(file):
                if not known:
                    found, rest = self._header(block)
                    if names is None or are_names(found, names):
                        names, block = found, rest
                    check(names)
                    known = True
                yield names, block  # type: ignore[misc]
        if names is None:
            raise UserError(f"{self.path}: is empty; expected a line of names")

    def rows(self, block: bytes, names: list[str], used: list[str]) -> Rows:
        """The rows of a block: the columns in use as UTF-8 text, an empty value as null."""
        if not block.strip(b"\r\n"):
            empty = pa.RecordBatch.from_pylist([], pa.schema([(name, pa.string()) for name in used]))
            return Rows(empty, np.zeros(0, np.int64), [], 0)
        with contextlib.suppress(pa.ArrowInvalid):
            table = self._read(block, names, used)
            columns = [table.column(name).combine_chunks() for name in used]
            return Rows(
                pa.RecordBatch.from_arrays(columns, names=used), np.arange(len(table), dtype=np.int64), [], len(table)
            )
        return self._whole_rows(block, names, used)

    def _blocks(self, file: BinaryIO) -> Iterator[bytes]:
        """Whole rows, some MiB at a time."""
        left = self.span[1] - self.span[0] if self.span else -1

        def more() -> bytes:
            nonlocal left
            chunk = file.read(_BLOCK_BYTES if left < 0 else min(_BLOCK_BYTES, left))
            left -= len(chunk) if left > 0 else 0
            return chunk

        chunk = more()
        if self.span is None or self.span[0] == 0:
            if chunk[:2] in (b"\xff\xfe", b"\xfe\xff"):
                self._fail(1, f'is UTF-16, expected {self.encoding}; state "encoding": "utf-16" in the spec')
            chunk = chunk.removeprefix(BYTE_ORDER_MARK)
        rest, end_of_row, line = b"", b"", 1
        while chunk:
            block = rest + chunk
            chunk = more()
            if not end_of_row and (b"\n" in block or b"\r" in block[:-1] or not chunk):
                end_of_row = b"\n" if b"\n" in block else b"\r"
            end = self._end(block, end_of_row, line, last=not chunk) if end_of_row else 0
            if end == 0 and len(block) > _LONGEST_ROW:
                why = "is a quote never closed?" if self.quotes else "is the file what its name says?"
                self._fail(line, f"a row of more than {_LONGEST_ROW >> 20} MiB; {why}")
            rest = block[end:]
            if end:
                line += block.count(end_of_row, 0, end)
                yield block[:end]

    def _end(self, block: bytes, end_of_row: bytes, line: int, last: bool) -> int:
        """Where the last whole row ends; of the last block, its end."""
        if not self.quotes or b'"' not in block:
            return len(block) if last else block.rfind(end_of_row) + 1
        if (sure := csv_cuts.end_of_rows(block, self.delimiter, end_of_row, last)) is not None:
            return sure
        outside, end = 0, 0  # where the last quoted value ended; where the last row did
        for value in _quoted_value(self.delimiter).finditer(block):
            end = max(end, block.rfind(end_of_row, outside, value.start()) + 1)
            outside = value.end()
            if outside == len(block) and not last:
                return end  # another quote may follow
            if not value[1]:
                at = line + block.count(end_of_row, 0, value.start())
                self._fail(at, f"the quote of {shown(value[0])} is never closed")
            if block[outside : outside + 1] not in (b"", self.delimiter.encode(), b"\r", b"\n"):
                found = shown(block[outside : outside + 20])
                between = "a comma" if self.delimiter == "," else repr(self.delimiter)
                self._fail(
                    line + block.count(end_of_row, 0, value.start()),
                    f"{found} follows the closing quote of {shown(value[0])}, expected {between} or the end of the "
                    "row; a quote in a value is doubled, or write the file as .tsv, which has no quoting",
                )
        return len(block) if last else max(end, block.rfind(end_of_row, outside) + 1)

    def _header(self, block: bytes) -> tuple[list[str], bytes]:
        """The names in the first row of a block, and the rows after it."""
        end = 0
        while end < len(block):
            found = re.compile(rb"\r\n|\n|\r").search(block, end)
            end = found.end() if found else len(block)
            row = block[:end]
            if row.strip(b"\r\n") and (
                not self.quotes or all(value[1] for value in _quoted_value(self.delimiter).finditer(row))
            ):
                break
        try:
            row.decode()
        except UnicodeDecodeError:
            if self.unsure:
                return [], block
            self._fail(1, f"the names {shown(row)} are not {self.expected}")
        try:
            return self._read(row, None, None).column_names, block[end:]
        except pa.ArrowInvalid as error:
            raise UserError(f"{self.path}: line 1: expected a line of names ({error})") from error

    def _whole_rows(self, block: bytes, names: list[str], used: list[str]) -> Rows:
        """`rows`, of a block in which some row has too few or too many values, or a value is not UTF-8.

        pyarrow hands a ragged row over as text and fails where it is not UTF-8, so it gets text: the same rows.
        """
        ragged: list[pyarrow.csv.InvalidRow] = []

        def note(row: pyarrow.csv.InvalidRow) -> str:
            ragged.append(row)
            return "skip"

        text = self._read(block.decode(errors="replace").encode(), names, used, note).combine_chunks()
        bad = [
            BadRow(
                row.number - 1,
                "number of values",
                f"{row.actual_columns} values ({shown(row.text.encode())}), expected {row.expected_columns}, one for "
                "each column",
            )
            for row in ragged
        ]
        read = len(text) + len(bad)
        numbers = np.delete(np.arange(read, dtype=np.int64), [row.row for row in bad])
        keep = np.ones(len(text), bool)
        # Any bytes are Latin-1, so that pyarrow can hand these rows over, and come back from it as they were.
        given = self._read(block.decode("latin-1").encode(), names, used, lambda row: "skip").combine_chunks()
        text = self._without_broken_text(given, text, numbers, used, bad, keep)
        kept = pa.RecordBatch.from_arrays([text.column(n).combine_chunks() for n in used], names=used)
        return Rows(kept.filter(pa.array(keep)), numbers[keep], sorted(bad), read)

    def _without_broken_text(
        self,
        given: pa.Table,
        replaced: pa.Table,
        numbers: NDArray[np.int64],
        used: list[str],
        bad: list[BadRow],
        keep: NDArray[np.bool_],
    ) -> pa.Table:
        """`replaced` as text; rows whose values are not UTF-8 are noted in `bad` and `keep`."""
        columns = []
        for name in used:
            text = replaced.column(name)
            columns.append(text)
            marked = pc.fill_null(pc.match_substring(text, "\ufffd"), False)
            for row in np.flatnonzero(marked.to_numpy(zero_copy_only=False)):
                value = given.column(name)[row].as_py().encode("latin-1")
                if is_text(value):
                    continue
                if keep[row]:
                    bad.append(
                        BadRow(int(numbers[row]), self.broken, f"{name}={value_shown(value)}, expected {self.expected}")
                    )
                keep[row] = False
        return pa.table(columns, names=used)

    def _read(
        self,
        block: bytes,
        names: list[str] | None,
        used: list[str] | None,
        note: Callable[[pyarrow.csv.InvalidRow], str] | None = None,
    ) -> pa.Table:
        return pyarrow.csv.read_csv(
            pa.BufferReader(block),
            # One thread: only then are rows numbered.
            pyarrow.csv.ReadOptions(block_size=len(block) + 1, column_names=names, use_threads=False),
            pyarrow.csv.ParseOptions(
                delimiter=self.delimiter,
                quote_char='"' if self.quotes else False,
                newlines_in_values=self.quotes,
                invalid_row_handler=note,
            ),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(used or [], pa.string()),
                include_columns=used,
                null_values=[""],
                strings_can_be_null=True,
            ),
        )

    def _fail(self, line: int, what: str) -> NoReturn:
        """Name a line of what is read, counted from 1."""
        with self.path.open("rb") as file:
            left = self.span[0] if self.span else 0
            while chunk := file.read(min(left, _BLOCK_BYTES)):
                line += chunk.count(b"\n")
                left -= len(chunk)
        raise UserError(f"{self.path}: line {line}: {what}")


def value_shown(value: object) -> str:
    """A value as messages show it: whole, unless it is huge."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text):,} characters)"


def is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def first_failing(values: pa.Array, kind: pa.DataType) -> int:
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


def shown(text: bytes) -> str:
    shown = text.decode(errors="replace")
    return repr(shown if len(shown) <= 40 else shown[:37] + "...")
