"""The blocks of a split, by which a stream reads it (stream.py): the row groups of its shards, found and checked once.

The first start reads every row as the cache does (cache.py), with the same checks, and keeps 24 bytes for each piece of
a block: where it lies, how many good rows it has, and a hash of the rows. Later reads of a piece compare it.
"""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_64, xxh3_64_intdigest

from megarec.data.cache import BadRows, Kind, Part, ensure_cache, good_rows, opened, shards_of
from megarec.data.records import RECORD, RecordLayout
from megarec.data.schema import Schema, Split, check_labelled
from megarec.errors import UserError

BLOCKS_FILE = "blocks.arrow"
_ROWS_PER_PIECE = 8_192
_COLUMNS = pa.schema(
    [
        ("shard", pa.int32()),
        ("group", pa.int32()),
        ("rows", pa.int32()),
        ("good", pa.int32()),
        ("hash", pa.uint64()),
    ]
)


class _Index:
    """A line a piece: blocks.arrow."""

    file, by_group = BLOCKS_FILE, True

    @property
    def rows(self) -> int:
        return _ROWS_PER_PIECE

    def write(self, path: Path, parts: Iterator[Part], layout: RecordLayout, salt: int) -> None:
        lines = [
            (part.shard, part.group, part.rows, len(part.good), piece_hash(layout.pack(part.good, salt, part.first)))
            for part in parts
        ]
        columns = [
            pa.array(list(column), kind) for column, kind in zip(zip(*lines, strict=True), _COLUMNS.types, strict=True)
        ]
        with path.open("wb") as file:
            with pa.ipc.new_stream(file, _COLUMNS) as stream:
                if lines:
                    stream.write_batch(pa.record_batch(columns, schema=_COLUMNS))
            file.flush()
            os.fsync(file.fileno())

    def checksum(self, path: Path, layout: RecordLayout) -> str:
        return xxh3_64(path.read_bytes()).hexdigest()


INDEX: Kind = _Index()


def piece_hash(packed: pa.RecordBatch) -> int:
    """XXH3 of the records, which have the hashes of their lists."""
    return xxh3_64_intdigest(packed.column(RECORD).flatten().to_numpy().view(np.uint8).data)


class Blocks:
    """The good rows of a split, block by block.

    Args:
        path, split, schema, bad_rows, cache: as of `store.open_split`.

    Attributes:
        layout, salt: of the records of its rows.
        sizes: int64 [blocks], good rows of each; all above 0.
        skipped: rows left out under bad_rows="skip", by reason.
        labels: those that occur, in order.

    Raises:
        UserError: as of `store.open_split`.
    """

    def __init__(self, path: Path, split: Split, schema: Schema, bad_rows: BadRows, cache: Path | None) -> None:
        check_labelled(path, schema)
        self.layout, self._shards = RecordLayout(schema), shards_of(path, split)
        damaged = None
        for _ in range(2):
            directory, built = ensure_cache(path, split, schema, bad_rows, cache, damaged, INDEX)
            file = directory / BLOCKS_FILE
            data, damaged = file.read_bytes(), file.stat().st_ino
            if xxh3_64(data).hexdigest() == built.layout:
                break
        else:
            raise UserError(f"{file} is damaged just after it was built: check this machine's disk and memory")
        self.salt, self.skipped, self.labels = built.salt, built.skipped, built.labels
        with pa.ipc.open_stream(data) as stream:
            lines = stream.read_all()
        shard, group, self._rows, self._good, self._hashes = (column.to_numpy() for column in lines.columns)
        begins = np.flatnonzero((np.diff(shard, prepend=-1) != 0) | (np.diff(group, prepend=-1) != 0))
        sizes = np.add.reduceat(self._good.astype(np.int64), begins)
        firsts, ends = np.cumsum(sizes) - sizes, np.append(begins[1:], len(shard))
        filled = sizes > 0
        self.sizes, self._firsts, self._begins, self._ends = (x[filled] for x in (sizes, firsts, begins, ends))
        self._shard, self._group = shard[self._begins], group[self._begins]

    def first(self, block: int) -> int:
        """How many good rows of the split come before this block: the number of its first one."""
        return int(self._firsts[block])

    def read(self, block: int, start: int, stop: int) -> tuple[int, list[pa.RecordBatch]]:
        """Good rows start .. stop of a block as records, in whole pieces; and how many of those come before start.

        Raises:
            UserError: the shard cannot be read, or has other rows than were checked.
        """
        begin, end = int(self._begins[block]), int(self._ends[block])
        ends: NDArray[np.int64] = np.cumsum(self._good[begin:end], dtype=np.int64)
        first, last = (int(np.searchsorted(ends, row, side="right")) for row in (start, stop - 1))
        before = int(ends[first] - self._good[begin + first])
        shard, number = self._shards[self._shard[block]], self.first(block) + before
        found: list[pa.RecordBatch] = []
        with opened(shard, self.layout.schema) as (file, columns):
            if self._group[block] >= file.num_row_groups:
                raise self._changed(shard)
            pieces = file.iter_batches(_ROWS_PER_PIECE, row_groups=[int(self._group[block])], columns=columns)
            wanted = range(begin + first, begin + last + 1)
            for piece, batch in zip(wanted, islice(pieces, first, None), strict=False):
                if self._good[piece]:
                    found.append(self._packed(batch, piece, shard, number))
                    number += len(found[-1])
        if number != self.first(block) + ends[last]:
            raise self._changed(shard)
        return start - before, found

    def _packed(self, batch: pa.RecordBatch, piece: int, shard: Path, first: int) -> pa.RecordBatch:
        """The good rows of a piece as records, if they are those that were checked."""
        try:
            if len(batch) == self._rows[piece]:
                if self._good[piece] < self._rows[piece]:
                    batch = good_rows(batch, self.layout.schema, "skip", shard)
                with np.errstate(invalid="ignore"):  # the length of a null
                    packed = self.layout.pack(batch, self.salt, first)
                if piece_hash(packed) == self._hashes[piece]:
                    return packed
        except (ValueError, TypeError, IndexError, OverflowError):
            pass  # nulls, or lists of other lengths: not what was checked
        raise self._changed(shard)

    def _changed(self, shard: Path) -> UserError:
        return UserError(
            f"{shard} has other rows than were checked when this run started: it was written again, or this machine's "
            "disk or memory is damaged; start the run again, which checks it"
        )
