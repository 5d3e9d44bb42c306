"""Write a prepared data set so that it is there whole or not at all."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from megarec.data.schema import SCHEMA_FILE, Schema
from megarec.errors import UserError

ROWS_PER_SHARD = 1 << 20
ROWS_PER_GROUP = 1 << 16


def write_dataset(output: Path, write: Callable[[Path], Schema]) -> Schema:
    """Let `write` fill a temporary directory beside `output`, then move it into place.

    A data set of ours that is already there is replaced once the new one is whole; on an error it stays as it is.

    Args:
        output: where to write the data set; its parents are made.
        write: writes shards and schema.json into the directory it gets and returns the schema.

    Raises:
        UserError: `output` holds something else than a data set of ours, or cannot be written.
    """
    check_output(output)
    if output.is_symlink():
        output = output.resolve()  # what the link points to is replaced; the link stays
    with writable(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        # Absolute: pyarrow takes file:x or s3:x for an address, and wrote there.
        partial = output.parent.absolute() / f".{output.name}.partial-{uuid4().hex[:8]}"
        partial.mkdir()
        try:
            schema = write(partial)
            publish(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return schema


@contextlib.contextmanager
def writable(output: Path) -> Iterator[None]:
    """Inside, an error of the file system is one of `--output`.

    Raises:
        UserError: the file system refused.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"--output {output}: cannot be written ({why}); choose another directory") from error


def check_output(output: Path) -> None:
    """Refuse an output that holds anything but a data set of ours: call it before long work.

    Raises:
        UserError: it holds something else.
    """
    if output.is_symlink() and not output.exists():
        raise UserError(f"--output {output}: is a link to {output.readlink()}, which is not there; make that directory")
    if output.is_dir() and any(output.iterdir()) and not (output / SCHEMA_FILE).is_file():
        raise UserError(f"--output {output}: not empty and not a prepared data set; choose another directory")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; choose a directory")


def publish(partial: Path, output: Path) -> None:
    """Move a data set into place by renames: a reader finds the old one, for an instant none, or the new one."""
    if not output.is_dir() or not any(output.iterdir()):
        partial.rename(output)
        return
    old = output.parent.absolute() / f".{output.name}.old-{uuid4().hex[:8]}"
    output.rename(old)
    try:
        partial.rename(output)
    except BaseException:
        old.rename(output)
        raise
    shutil.rmtree(old)


class SplitWriter:
    """Parquet shards of one split, `000.parquet`, `001.parquet`, ..., of at most ROWS_PER_SHARD rows each.

    Attributes:
        rows: rows written so far.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.rows = 0
        self._directory = directory
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Append rows; all tables have the same columns."""
        while table.num_rows:
            shard, used = divmod(self.rows, ROWS_PER_SHARD)
            if used == 0:
                self.close()
                self._writer = pq.ParquetWriter(
                    self._directory / f"{shard:03d}.parquet", table.schema, compression="zstd"
                )
            assert self._writer is not None
            part = table.slice(0, ROWS_PER_SHARD - used)
            self._writer.write_table(part, row_group_size=ROWS_PER_GROUP)
            self.rows += part.num_rows
            table = table.slice(part.num_rows)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
