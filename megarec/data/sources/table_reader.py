"""Stream people's own CSV, TSV or parquet files; what cannot be used is named by file, row and column."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from megarec.data.sources.table_spec import TableSpec
from megarec.data.sources.text_files import DELIMITERS, TextFile, kind_of
from megarec.errors import UserError, did_you_mean

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
        counted = "from 0" if kind_of(self.path)[0] == ".parquet" else "from 0, header not counted"
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
    suffix, _ = kind_of(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file; files are read twice, so write a pipe to a file first")
    used = [name for name, column in spec.columns.items() if column.type != "ignored"]
    try:
        if suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                _check_columns(path, file.schema_arrow.names, spec)
                yield from file.iter_batches(_PARQUET_ROWS, columns=used)
        else:
            text = TextFile(path, DELIMITERS[suffix], None if spec.header else list(spec.columns))
            yield from text.tables(used, lambda names: _check_columns(path, names, spec))
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
