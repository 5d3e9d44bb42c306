"""CSV and TSV as blocks of whole rows: what a file says is what is read.

Tab-separated text has no quoting: every line is a row, a quote is a character like any other. CSV is RFC 4180: a value
that begins with a quote ends with one, may hold commas and line breaks, and doubles the quotes in it; a quote within a
value that does not begin with one is a character. Both are UTF-8, with or without a byte-order mark, and may be
compressed by gzip.
"""

import contextlib
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

import pyarrow as pa
import pyarrow.csv

from megarec.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_BLOCK_BYTES = 1 << 22
_LONGEST_ROW = 1 << 24
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A value that begins with a quote, and the quote that ends it: the group is empty where the text ends first. The
# quantifiers give nothing back, so that the time is linear.
_QUOTED = re.compile(rb'(?:(?<=[,\r\n])|\A)"(?:[^"]++|"")*+("?)')


def kind_of(path: Path) -> tuple[str, bool]:
    """(suffix without .gz, whether the file is compressed), in lower case.

    Raises:
        UserError: no suffix of a file that can be read; says what to do.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compressed = suffixes[-1:] == [".gz"]
    suffix = suffixes[-1 - compressed] if len(suffixes) > compressed else ""
    if suffix in DELIMITERS or (suffix == ".parquet" and not compressed):
        return suffix, compressed
    remedy = "convert it, or decompress it"
    if suffix == ".txt":
        remedy = "call it .tsv if tabs separate its values, .csv if commas do"
    expected = "expected .csv, .tsv or .parquet (.csv.gz and .tsv.gz as well)"
    raise UserError(f"{path}: suffix {path.suffix!r}, {expected}; {remedy}")


@dataclass(frozen=True)
class TextFile:
    """How a file of text is read.

    Attributes:
        names: of its columns where it has no line of names; None: its first row has them.
    """

    path: Path
    delimiter: str
    names: list[str] | None

    def tables(self, used: list[str], check: Callable[[list[str]], None]) -> Iterator[pa.RecordBatch]:
        """The rows in order, in blocks: the columns in use as UTF-8 text, an empty value as null.

        Args:
            check: is given the names of the columns once they are known.

        Raises:
            UserError: names the file and line, or row and column, of what cannot be read.
        """
        names, row = self.names, 0
        if names is not None:
            check(names)
        with self._open() as file:
            for block in self._blocks(file):
                if names is None:
                    names, block = self._header(block)
                    check(names)
                table = self._parsed(block, names, used, row)
                row += len(table)
                yield table
        if names is None:
            raise UserError(f"{self.path}: is empty; expected a line of names")

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        _, compressed = kind_of(self.path)
        try:
            with gzip.open(self.path, "rb") if compressed else self.path.open("rb") as file:
                yield cast(BinaryIO, file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{self.path}: cannot be read: damaged gzip data ({error})") from error

    def _blocks(self, file: BinaryIO) -> Iterator[bytes]:
        """Whole rows, some MiB at a time."""
        chunk = file.read(_BLOCK_BYTES)
        if chunk[:2] in (b"\xff\xfe", b"\xfe\xff"):
            self._fail(1, "is UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
        rest, chunk = b"", chunk.removeprefix(_BYTE_ORDER_MARK)
        end_of_row, line = b"", 1
        while chunk:
            block = rest + chunk
            chunk = file.read(_BLOCK_BYTES)
            if not end_of_row and (b"\n" in block or b"\r" in block[:-1] or not chunk):
                end_of_row = b"\n" if b"\n" in block else b"\r"
            end = self._end(block, end_of_row, line, last=not chunk) if end_of_row else 0
            if end == 0 and len(block) > _LONGEST_ROW:
                why = "is a quote never closed?" if self.delimiter == "," else "is the file what its name says?"
                self._fail(line, f"a row of more than {_LONGEST_ROW >> 20} MiB; {why}")
            rest = block[end:]
            if end:
                line += block.count(end_of_row, 0, end)
                yield block[:end]

    def _end(self, block: bytes, end_of_row: bytes, line: int, last: bool) -> int:
        """Where the last whole row ends; of the last block, its end."""
        outside, end = 0, 0  # where the last quoted value ended; where the last row did
        quoted = _QUOTED.finditer(block) if self.delimiter == "," and b'"' in block else iter(())
        for value in quoted:
            end = max(end, block.rfind(end_of_row, outside, value.start()) + 1)
            outside = value.end()
            if outside == len(block) and not last:
                return end  # another quote may follow
            at = line + block.count(end_of_row, 0, value.start())
            if not value[1]:
                self._fail(at, f"the quote of {_shown(value[0])} is never closed")
            if block[outside : outside + 1] not in (b"", b",", b"\r", b"\n"):
                found = _shown(block[outside : outside + 20])
                self._fail(
                    at,
                    f"{found} follows the closing quote of {_shown(value[0])}, expected a comma or the end of the "
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
            if row.strip(b"\r\n") and (self.delimiter != "," or all(value[1] for value in _QUOTED.finditer(row))):
                break
        try:
            row.decode()
        except UnicodeDecodeError:
            self._fail(1, f"the names {_shown(row)} are not UTF-8; convert the file: iconv -f LATIN1 -t UTF-8")
        try:
            return self._read(row, None, None).column_names, block[end:]
        except pa.ArrowInvalid as error:
            raise UserError(f"{self.path}: line 1: expected a line of names ({error})") from error

    def _parsed(self, block: bytes, names: list[str], used: list[str], start: int) -> pa.RecordBatch:
        if not block.strip(b"\r\n"):
            return pa.RecordBatch.from_pylist([], pa.schema([(name, pa.string()) for name in used]))
        try:
            table = self._read(block, names, used).combine_chunks()
        except pa.ArrowInvalid as error:
            row = self._ragged_row(block, names, used)
            if row is None:
                raise
            raise UserError(
                f"{self.path}: row {start + row.number - 1} (from 0, header not counted): {row.actual_columns} values "
                f"({_shown(row.text.encode())}), expected {row.expected_columns}, one for each column"
            ) from error
        columns = []
        for name in used:
            values = table.column(name).combine_chunks()
            try:
                columns.append(values.cast(pa.string()))
            except pa.ArrowInvalid as error:
                bad = first_failing(values, pa.string())
                raise UserError(
                    f"{self.path}: row {start + bad} (from 0, header not counted): {name}={values[bad].as_py()!r}, "
                    "expected UTF-8; convert the file: iconv -f LATIN1 -t UTF-8"
                ) from error
        return pa.RecordBatch.from_arrays(columns, names=used)

    def _ragged_row(self, block: bytes, names: list[str], used: list[str]) -> pyarrow.csv.InvalidRow | None:
        """The first row with too few or too many values, if a block has one.

        pyarrow hands such a row over as text and fails where it is not UTF-8, so it gets text: the same rows.
        """
        ragged: list[pyarrow.csv.InvalidRow] = []

        def note(row: pyarrow.csv.InvalidRow) -> str:
            ragged.append(row)
            return "error"

        with contextlib.suppress(pa.ArrowInvalid):
            self._read(block.decode(errors="replace").encode(), names, used, note)
        return ragged[0] if ragged else None

    def _read(
        self,
        block: bytes,
        names: list[str] | None,
        used: list[str] | None,
        note: Callable[[pyarrow.csv.InvalidRow], str] | None = None,
    ) -> pa.Table:
        quoted = self.delimiter == ","
        return pyarrow.csv.read_csv(
            pa.BufferReader(block),
            # One thread: only then are rows numbered.
            pyarrow.csv.ReadOptions(block_size=len(block) + 1, column_names=names, use_threads=False),
            pyarrow.csv.ParseOptions(
                delimiter=self.delimiter,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                invalid_row_handler=note,
            ),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(used or [], pa.binary()),  # a bad value can then be shown as it stands
                include_columns=used,
                null_values=[""],
                strings_can_be_null=True,
            ),
        )

    def _fail(self, line: int, what: str) -> NoReturn:
        raise UserError(f"{self.path}: line {line}: {what}")


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


def _shown(text: bytes) -> str:
    shown = text.decode(errors="replace")
    return repr(shown if len(shown) <= 40 else shown[:37] + "...")
