"""The Arrow cache of a split: checked rows in the layout that random access wants, built once, memory-mapped by all.

`DIR/.arrow/<split>-<fingerprint>/rows.arrow` is an Arrow IPC stream with, per row, `ids` (all single-valued
features side by side), `numeric`, `label`, and a list column for each multi-valued feature and for each one's weights;
`built.json` beside it has the size and checksum of that file and counts the rows left out, by reason. The fingerprint
covers shards, columns and policy, so a cache is never stale. It is derived: whoever opens one reads it once through,
and builds it anew where it is not what was built.
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
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError
from xxhash import xxh3_64

from megarec.data.row_checks import as_numbers, check_columns, find_defects
from megarec.data.schema import SCHEMA_FILE, Schema, Split
from megarec.errors import UserError
from megarec.files import read_json

BadRows = Literal["error", "skip"]
CACHE_DIRECTORY = ".arrow"
ROWS_FILE = "rows.arrow"
BUILT_FILE = "built.json"
_LAYOUT = 2
_ROWS_PER_RECORD_BATCH = 65_536


def list_column(feature: str) -> str:
    """The cache's column of a multi-valued feature; the prefix keeps it apart from ids, numeric and label."""
    return f"list:{feature}"


def weights_column(feature: str) -> str:
    """The cache's column of a weighted feature's weights."""
    return f"weights:{feature}"


class Built(BaseModel):
    """built.json: what a whole cache looks like.

    Attributes:
        bytes, xxh3: of rows.arrow: its size, and XXH3 of 64 bits in hexadecimal, enough against accidents.
        skipped: rows left out, by reason.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    bytes: int
    xxh3: str
    skipped: dict[str, int]


def ensure_cache(
    path: Path, split: Split, schema: Schema, bad_rows: BadRows, elsewhere: Path | None = None
) -> tuple[Path, Built]:
    """The directory with a split's rows.arrow, built if need be, and what its built.json says.

    Any number of processes may call this at once: one builds, the others wait and reuse. The cache appears by a
    rename when it is whole, and the lock falls with its process, so a killed builder leaves nothing behind but a
    partial directory that the next one clears away.

    Args:
        elsewhere: a directory for the cache; None: in the data set's own.

    Raises:
        UserError: no shards, a bad shard or row, or the cache cannot be written.
    """
    shards = sorted((path / split).glob("*.parquet"))
    if not shards:
        raise UserError(f"{path / split} holds no *.parquet shard; prepare the data first (tools/prepare_data.py)")
    caches = path / CACHE_DIRECTORY if elsewhere is None else elsewhere
    cache = caches / f"{split}-{_fingerprint(split, shards, schema, bad_rows, elsewhere is not None)}"
    if built := _whole(cache):
        return cache, built
    try:
        caches.mkdir(parents=elsewhere is not None, exist_ok=True)
        with _exclusive(caches / "lock"):
            built = _whole(cache)  # another process may have been first
            if built is None:
                if cache.exists():
                    print(f"{cache}: damaged, is built anew", file=sys.stderr, flush=True)
                    _set_aside(cache)
                partial = cache.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                built = _build(partial, split, shards, schema, bad_rows)
                partial.rename(cache)
    except OSError as error:
        raise UserError(
            f"{cache} cannot be written ({error.strerror or error}); the cache needs space there, or set data.cache "
            "(evaluate: --cache) to a directory elsewhere"
        ) from error
    return cache, built


def _whole(cache: Path) -> Built | None:
    """What built.json says, if rows.arrow is just that."""
    try:
        built = Built.model_validate(read_json(cache / BUILT_FILE, "what was built"))
        rows = cache / ROWS_FILE
        if rows.stat().st_size != built.bytes or _checksum(rows) != built.xxh3:
            return None
    except (OSError, UserError, ValidationError):
        return None
    return built


def _checksum(path: Path) -> str:
    checksum = xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum.update(block)
    return checksum.hexdigest()


def _set_aside(cache: Path) -> None:
    """Out of the way by a rename: whoever has it mapped keeps it."""
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
    """Hold a lock among processes; the kernel lets go of it when its holder dies."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fingerprint(split: Split, shards: list[Path], schema: Schema, bad_rows: BadRows, elsewhere: bool) -> str:
    columns = [(f.name, f.rows, f.multi_valued, f.weighted) for f in schema.categorical]
    files = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    key: list[object] = [_LAYOUT, bad_rows, columns, schema.numeric, schema.label, schema.rows.get(split), files]
    if elsewhere:
        key.append(str(shards[0].parent.resolve()))  # the caches of several data sets may lie in one place
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _build(cache: Path, split: Split, shards: list[Path], schema: Schema, bad_rows: BadRows) -> Built:
    skipped: Counter[str] = Counter()
    written = 0
    with (cache / ROWS_FILE).open("wb") as file:
        with pa.ipc.new_stream(file, _cache_schema(schema)) as stream:
            for shard in shards:
                start = 0
                for batch in _record_batches(shard, schema):
                    good = _good_rows(batch, schema, bad_rows, shard, start, skipped)
                    start += len(batch)
                    written += len(good)
                    if len(good):
                        stream.write_batch(_packed(good, schema))
        file.flush()
        os.fsync(file.fileno())
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
    rows = cache / ROWS_FILE
    built = Built(bytes=rows.stat().st_size, xxh3=_checksum(rows), skipped=dict(skipped))
    (cache / BUILT_FILE).write_text(built.model_dump_json(), encoding="utf-8")
    return built


def _record_batches(shard: Path, schema: Schema) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(shard) as file:
            check_columns(shard, file.schema_arrow, schema)
            columns = [f.name for f in schema.categorical] + [*schema.numeric, schema.label]
            columns += [f.weights_column for f in schema.categorical if f.weighted]
            yield from file.iter_batches(_ROWS_PER_RECORD_BATCH, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shard} cannot be read as parquet ({error}); prepare the data again") from error


def _good_rows(
    batch: pa.RecordBatch, schema: Schema, bad_rows: BadRows, shard: Path, start: int, skipped: Counter[str]
) -> pa.RecordBatch:
    """The rows without defects; each bad row is counted once, under its first defect."""
    good = np.ones(len(batch), bool)
    for defect in find_defects(batch, schema):
        if bad_rows == "error":
            row = start + int(defect.rows.argmax())
            raise UserError(
                f"{shard}: row {row} (from 0): {defect.column}={defect.value!r}, expected {defect.expected}; fix "
                "the row and prepare again, or set data.bad_rows='skip' to leave such rows out"
            )
        skipped[defect.reason] += int((defect.rows & good).sum())
        good &= ~defect.rows
    return batch if good.all() else batch.filter(pa.array(good))


def _cache_schema(schema: Schema) -> pa.Schema:
    singles = sum(not f.multi_valued for f in schema.categorical)
    fields = [("label", pa.float32())]
    if singles:
        fields.append(("ids", pa.list_(pa.int64(), singles)))
    if schema.numeric:
        fields.append(("numeric", pa.list_(pa.float32(), len(schema.numeric))))
    fields += [(list_column(f.name), pa.list_(pa.int64())) for f in schema.categorical if f.multi_valued]
    fields += [(weights_column(f.name), pa.list_(pa.float32())) for f in schema.categorical if f.weighted]
    return pa.schema(fields)


def _packed(batch: pa.RecordBatch, schema: Schema) -> pa.RecordBatch:
    """A record batch in the cache's layout: what one example needs lies side by side."""
    columns: list[pa.Array] = [pa.array(as_numbers(batch.column(schema.label), np.float32))]
    singles = [batch.column(f.name) for f in schema.categorical if not f.multi_valued]
    if singles:
        rows = np.stack([as_numbers(column, np.int64) for column in singles], axis=1)
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), len(singles)))
    if schema.numeric:
        numbers = np.stack([as_numbers(batch.column(name), np.float32) for name in schema.numeric], axis=1)
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), len(schema.numeric)))
    columns += [batch.column(f.name).cast(pa.list_(pa.int64())) for f in schema.categorical if f.multi_valued]
    columns += [batch.column(f.weights_column).cast(pa.list_(pa.float32())) for f in schema.categorical if f.weighted]
    return pa.RecordBatch.from_arrays(columns, schema=_cache_schema(schema))
