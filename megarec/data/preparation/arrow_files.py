"""Parquet and Arrow's files and streams: the parts that can be read by themselves, and their rows in batches."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megarec.errors import UserError

BATCH_ROWS = 1 << 16
_MAGIC = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
Groups = tuple[int, ...] | None


def groups_of(path: Path, kind: str, size: int, unit_bytes: int, unit_rows: int) -> list[tuple[Groups, int]]:
    """The row groups or batches of each unit of a file, None where all is one unit, and the unit's bytes.

    Raises:
        OSError, pa.ArrowException: the file cannot be read.
    """
    if kind == "parquet":
        with pq.ParquetFile(path) as file:
            rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        units = _together(rows, unit_rows)
        return [(some, size * sum(rows[i] for i in some) // max(sum(rows), 1)) for some in units]
    if not _is_file(path):
        return [(None, size)]
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        count = reader.num_record_batches
    units = _together([1] * count, max(1, count * unit_bytes // max(size, 1)))
    return [(some, size * len(some) // max(count, 1)) for some in units]


def _together(groups: list[int], least: int) -> list[tuple[int, ...]]:
    """Numbers of neighbouring groups whose sizes are at least so much together."""
    found: list[tuple[int, ...]] = []
    some: tuple[int, ...] = ()
    total = 0
    for number, count in enumerate(groups):
        some, total = (*some, number), total + count
        if total >= least:
            found.append(some)
            some, total = (), 0
    return [*found, some] if some or not found else found


def batches(
    path: Path, kind: str, groups: Groups, used: list[str], check: Callable[[list[str]], None]
) -> Iterator[pa.RecordBatch]:
    """The rows of some groups, or of all, with the columns in use.

    Args:
        check: is given the names of all columns before anything is read.

    Raises:
        OSError, pa.ArrowException: the file cannot be read, or is damaged.
    """
    if kind == "parquet":
        with pq.ParquetFile(path) as file:
            check(file.schema_arrow.names)
            for batch in file.iter_batches(BATCH_ROWS, groups, columns=used, use_threads=False):
                batch.validate(full=True)  # text that is not UTF-8, which nothing else would report
                yield batch
        return
    with pa.memory_map(str(path)) as source:
        open_it = pa.ipc.open_stream if groups is None else pa.ipc.open_file
        with open_it(source, options=pa.ipc.IpcReadOptions(use_threads=False)) as reader:
            check(reader.schema.names)
            for batch in map(reader.get_batch, groups) if groups is not None else reader:
                chosen = batch.select(used)
                chosen.validate(full=True)  # the file's offsets are used unchecked: a wrong one would crash
                for start in range(0, len(chosen), BATCH_ROWS):
                    yield chosen.slice(start, BATCH_ROWS)


def names_of(path: Path, kind: str) -> list[str]:
    """The names of all columns.

    Raises:
        OSError, pa.ArrowException: the file cannot be read.
    """
    return list(_opened(path, kind)[0].names)


def sample(path: Path, kind: str, rows: int) -> pa.RecordBatch:
    """The first rows of a file, all columns.

    Raises:
        OSError, pa.ArrowException: the file cannot be read, or is damaged.
    """
    schema, groups = _opened(path, kind)
    found: list[pa.RecordBatch] = []
    for batch in batches(path, kind, groups, schema.names, lambda names: None):
        found.append(batch)
        if sum(map(len, found)) >= rows:
            break
    table = pa.Table.from_batches(found, schema).slice(0, rows).combine_chunks()
    return next(iter(table.to_batches()), pa.RecordBatch.from_pylist([], schema))


def _opened(path: Path, kind: str) -> tuple[pa.Schema, Groups]:
    """The schema of a file, and its batches; of parquet and of a stream None: all."""
    if kind == "parquet":
        with pq.ParquetFile(path) as file:
            return file.schema_arrow, None
    is_file = _is_file(path)
    with pa.memory_map(str(path)) as source, (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source) as reader:
        return reader.schema, tuple(range(reader.num_record_batches)) if is_file else None


def _is_file(path: Path) -> bool:
    """Whether it is Arrow's file, which begins and ends with a mark; else a stream, which has none.

    Raises:
        UserError: it ends too early, or is of Feather's first version.
    """
    with path.open("rb") as file:
        begin = file.read(len(_MAGIC))
        file.seek(max(0, path.stat().st_size - len(_END_OF_STREAM)))
        end = file.read()
    if begin.startswith(b"FEA1"):
        raise UserError(f"{path}: is Feather of version 1, expected Arrow's file or stream; rewrite it with pyarrow")
    if begin == _MAGIC and not end.endswith(_MAGIC):
        raise UserError(f"{path}: cannot be read: it ends before its last bytes: was it written to its end?")
    if begin == _MAGIC:
        return True
    if end != _END_OF_STREAM:
        raise UserError(
            f"{path}: cannot be read: it is neither Arrow's file nor a stream that was written to its end: close the "
            "writer (or is it cut off?)"
        )
    return False
