"""The Arrow cache of a split: checked rows in the layout that random access wants, built once, memory-mapped by all.

`DIR/.arrow/<split>-<fingerprint>/rows.arrow` is an Arrow IPC stream with a record per row and, where there are lists,
all of a row's ids in one list and all of its weights in another (records.py); `built.json` beside it says what that
file is and counts the rows left out, by reason. The fingerprint covers shards, columns and policy, so a cache is never
stale. It is derived: a process that finds it damaged, when opening it or reading a row
(store.py), rebuilds it.

Where the shards are read as a stream, the same pass over them leaves blocks.arrow in its place, which has a line for
some thousands of rows (blocks.py).
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError
from xxhash import xxh3_64

from megarec.data.mapped import MappedFile
from megarec.data.records import RecordLayout
from megarec.data.row_checks import as_numbers, check_columns, find_defects
from megarec.data.schema import SCHEMA_FILE, Schema, Split
from megarec.errors import UserError
from megarec.files import read_json

BadRows = Literal["error", "skip"]
CACHE_DIRECTORY = ".arrow"
ROWS_FILE = "rows.arrow"
BUILT_FILE = "built.json"
_LAYOUT = 4
_ROWS_PER_RECORD_BATCH = 65_536


class Built(BaseModel):
    """built.json: what a whole cache looks like.

    Attributes:
        fingerprint: of the cache; the checksums of its rows start from it.
        bytes: size of rows.arrow, or of blocks.arrow.
        layout: of rows.arrow (`MappedFile.layout`); of blocks.arrow the XXH3.
        labels: those that occur, in order.
        skipped: rows left out, by reason.
        xxh3: of all the above: XXH3 of 64 bits in hexadecimal, enough against accidents.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    fingerprint: str
    bytes: int
    layout: str
    labels: list[float]
    skipped: dict[str, int]
    xxh3: str = ""

    @property
    def salt(self) -> int:
        return int(self.fingerprint, 16)

    def sealed(self) -> "Built":
        text = self.model_dump_json(exclude={"xxh3"})
        return self.model_copy(update={"xxh3": xxh3_64(text.encode()).hexdigest()})


@dataclass(frozen=True)
class Part:
    """Rows of a shard that were read and checked.

    Attributes:
        shard: its place among the split's.
        group: the row group of its file, where `Kind.by_group`.
        rows: how many were read.
        good: those without defects.
        first: how many good rows of the split come before them.
    """

    shard: int
    group: int
    rows: int
    good: pa.RecordBatch
    first: int


class Kind(Protocol):
    """What is cached of a split.

    Attributes:
        file: its name.
        by_group: rows are read row group by row group; else they may be of several.
    """

    file: str
    by_group: bool

    @property
    def rows(self) -> int:
        """Of a shard that are read at a time, at most."""

    def write(self, path: Path, parts: Iterator[Part], layout: RecordLayout, salt: int) -> None:
        """Write the file."""

    def checksum(self, path: Path, layout: RecordLayout) -> str:
        """`Built.layout` of the file."""


class _Rows:
    """All rows as records: rows.arrow."""

    file, by_group = ROWS_FILE, False

    @property
    def rows(self) -> int:
        return _ROWS_PER_RECORD_BATCH

    def write(self, path: Path, parts: Iterator[Part], layout: RecordLayout, salt: int) -> None:
        with path.open("wb") as file:
            with pa.ipc.new_stream(file, layout.arrow_schema) as stream:
                for part in parts:
                    if len(part.good):
                        stream.write_batch(layout.pack(part.good, salt, part.first))
            file.flush()
            os.fsync(file.fileno())

    def checksum(self, path: Path, layout: RecordLayout) -> str:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            return MappedFile(stream.read_all(), layout).layout


ROWS: Kind = _Rows()


def ensure_cache(
    path: Path,
    split: Split,
    schema: Schema,
    bad_rows: BadRows,
    elsewhere: Path | None = None,
    damaged: int | None = None,
    kind: Kind = ROWS,
) -> tuple[Path, Built]:
    """The directory with a split's cache, built if need be, and what its built.json says.

    Any number of processes may call this at once: one builds, the others wait and reuse. The cache appears by a
    rename when it is whole, and the lock ends with its process, so a killed builder leaves only a
    partial directory, which the next one removes.

    Args:
        elsewhere: a directory for the cache; None: in the data set's own.
        damaged: inode of the file in which the caller has found damage.

    Raises:
        UserError: no shards, a bad shard or row, or the cache cannot be written.
    """
    shards = shards_of(path, split)
    if not shards:
        raise UserError(f"{path / split} holds no *.parquet shard; prepare the data first (tools/prepare_data.py)")
    caches = path / CACHE_DIRECTORY if elsewhere is None else elsewhere
    fingerprint = _fingerprint(split, shards, schema, bad_rows, elsewhere is not None, kind)
    cache = caches / f"{split}-{fingerprint}"
    if built := _whole(cache, fingerprint, damaged, kind):
        return cache, built
    try:
        caches.mkdir(parents=elsewhere is not None, exist_ok=True)
        with _exclusive(caches / "lock"):
            built = _whole(cache, fingerprint, damaged, kind)  # another process may have been first
            if built is None:
                if cache.exists():
                    print(f"{cache}: damaged, is rebuilt", file=sys.stderr, flush=True)
                    _set_aside(cache)
                partial = cache.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                built = _build(partial, fingerprint, split, shards, schema, bad_rows, kind)
                partial.rename(cache)
    except OSError as error:
        raise UserError(
            f"{cache} cannot be written ({error.strerror or error}); the cache needs space there, or set data.cache "
            "(evaluate: --cache) to a directory elsewhere"
        ) from error
    return cache, built


def shards_of(path: Path, split: Split) -> list[Path]:
    """A split's shards, in order."""
    return sorted((path / split).glob("*.parquet"))


def _whole(cache: Path, fingerprint: str, damaged: int | None, kind: Kind = ROWS) -> Built | None:
    """What built.json says, if it is that of this cache, and its file has its size and no known damage."""
    try:
        built = Built.model_validate(read_json(cache / BUILT_FILE, "what was built"))
        file = (cache / kind.file).stat()
        fits = built == built.sealed() and built.fingerprint == fingerprint and file.st_size == built.bytes
        return built if fits and file.st_ino != damaged else None
    except (OSError, UserError, ValidationError):
        return None


def _set_aside(cache: Path) -> None:
    """Moved away by a rename: processes that have it mapped keep it."""
    old = cache.with_suffix(".damaged")
    if old.is_dir():
        shutil.rmtree(old)
    cache.rename(old)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink()


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock among processes; the kernel releases it when its holder dies."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fingerprint(
    split: Split, shards: list[Path], schema: Schema, bad_rows: BadRows, elsewhere: bool, kind: Kind
) -> str:
    columns = [(f.name, f.rows, f.multi_valued, f.weighted) for f in schema.categorical]
    files = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    key: list[object] = [_LAYOUT, bad_rows, columns, schema.numeric, schema.label, schema.rows.get(split), files]
    if schema.tasks or schema.optional or schema.weighted:
        key.append([schema.tasks, schema.optional, schema.row_weights])
    if elsewhere:
        key.append(str(shards[0].parent.resolve()))  # the caches of several data sets may lie in one place
    if kind.by_group:
        key.append([kind.file, kind.rows])
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _build(
    cache: Path, fingerprint: str, split: Split, shards: list[Path], schema: Schema, bad_rows: BadRows, kind: Kind
) -> Built:
    skipped: Counter[str] = Counter()
    labels: set[float] = set()
    written, layout = 0, RecordLayout(schema)

    def parts() -> Iterator[Part]:
        nonlocal written
        for number, shard in enumerate(shards):
            start = 0
            for group, batch in _groups(shard, schema, kind):
                good = good_rows(batch, schema, bad_rows, shard, start, skipped)
                start += len(batch)
                known = good.column(schema.label).drop_null()
                labels.update(np.unique(as_numbers(known, np.float32)).tolist())
                yield Part(number, group, len(batch), good, written)
                written += len(good)

    file = cache / kind.file
    kind.write(file, parts(), layout, int(fingerprint, 16))
    found, stated = written + skipped.total(), schema.rows.get(split)
    directory = shards[0].parent
    if written == 0:
        why = f"all {found} rows are bad: {dict(skipped)}" if found else "its shards have no rows"
        raise UserError(f"{directory} is empty: {why}; prepare the data again")
    if stated is not None and found != stated:
        what = "is a shard missing" if found < stated else "is a shard there that is not part of it"
        raise UserError(
            f"{directory} has {found} rows in {len(shards)} shards, but {SCHEMA_FILE} says rows.{split}={stated}: "
            f"{what}? prepare the data again, or correct rows.{split}"
        )
    built = Built(
        fingerprint=fingerprint,
        bytes=file.stat().st_size,
        layout=kind.checksum(file, layout),
        labels=sorted(labels),
        skipped=dict(skipped),
    ).sealed()
    (cache / BUILT_FILE).write_text(built.model_dump_json(), encoding="utf-8")
    return built


def _groups(shard: Path, schema: Schema, kind: Kind) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Rows of a shard, with their row group, or 0 where the kind does not ask for it."""
    with opened(shard, schema) as (file, columns):
        if not kind.by_group:
            yield from ((0, batch) for batch in file.iter_batches(kind.rows, columns=columns))
            return
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(kind.rows, row_groups=[group], columns=columns):
                yield group, batch


@contextmanager
def opened(shard: Path, schema: Schema) -> Iterator[tuple[pq.ParquetFile, list[str]]]:
    """A shard and the columns to read of it.

    Raises:
        UserError: it lacks one, or cannot be read; inside as well.
    """
    columns = [f.name for f in schema.categorical] + list(schema.numbers)
    columns += [f.weights_column for f in schema.categorical if f.weighted]
    try:
        with pq.ParquetFile(shard) as file:
            check_columns(shard, file.schema_arrow, schema)
            yield file, columns
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shard} cannot be read as parquet ({error}); prepare the data again") from error


def good_rows(
    batch: pa.RecordBatch,
    schema: Schema,
    bad_rows: BadRows,
    shard: Path,
    start: int = 0,
    skipped: Counter[str] | None = None,
) -> pa.RecordBatch:
    """The rows without defects; each bad row is counted once, under its first defect.

    Args:
        start: place of the first row in the shard.
        skipped: counts the bad rows by reason.

    Raises:
        UserError: a row is bad, and bad_rows is "error".
    """
    good = np.ones(len(batch), bool)
    for defect in find_defects(batch, schema):
        if bad_rows == "error":
            row = start + int(defect.rows.argmax())
            raise UserError(
                f"{shard}: row {row} (from 0): {defect.column}={defect.value!r}, expected {defect.expected}; fix "
                "the row and prepare again, or set data.bad_rows='skip' to leave such rows out"
            )
        if skipped is not None:
            skipped[defect.reason] += int((defect.rows & good).sum())
        good &= ~defect.rows
    return batch if good.all() else batch.filter(pa.array(good))
