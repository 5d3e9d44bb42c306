"""The second half of a preparation: pieces and look-ups -> the parquet shards of a split.

Shard k of a split has its rows k * ROWS_PER_SHARD and on, whichever pieces these lie in, so that the bytes of a shard
follow from the rows and the vocabularies alone.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megarec.data.preparation.kept_spec import Fitted
from megarec.data.preparation.merge import LookUp, look_up_file
from megarec.data.preparation.piece_files import Mapped
from megarec.data.preparation.scan import Piece
from megarec.data.preparation.table_spec import Bucketised, Lists, TableSpec
from megarec.data.preparation.values import buckets, standardised
from megarec.data.writing import ROWS_PER_GROUP, ROWS_PER_SHARD
from megarec.files import renamed_to, write_whole


@dataclass(frozen=True)
class Shard:
    """A parquet file to write.

    Attributes:
        slices: the pieces that its rows lie in, each with its first row and the row after its last.
    """

    split: str
    number: int
    name: str
    slices: tuple[tuple[Piece, int, int], ...]

    @property
    def rows(self) -> int:
        return sum(end - start for _, start, end in self.slices)


def shards_of(split: str, pieces: list[Piece]) -> list[Shard]:
    """The shards of a split, in order."""
    total = sum(piece.rows for piece in pieces)
    count = -(-total // ROWS_PER_SHARD)
    slices: list[list[tuple[Piece, int, int]]] = [[] for _ in range(count)]
    first = 0  # of the piece, among the rows of the split
    for piece in pieces:
        start = 0
        while start < piece.rows:
            shard = (first + start) // ROWS_PER_SHARD
            end = min(piece.rows, (shard + 1) * ROWS_PER_SHARD - first)
            slices[shard].append((piece, start, end))
            start = end
        first += piece.rows
    width = max(3, len(str(count - 1)))
    return [Shard(split, i, f"{i:0{width}d}.parquet", tuple(some)) for i, some in enumerate(slices)]


@dataclass(frozen=True)
class Encoder:
    """What encoding needs beside a shard.

    Attributes:
        pieces, tables: directories of scan.py and merge.py.
        table_of: the number of the table of each feature.
        fitted: what was fitted on the training split.
        data, done: where shards, and what is known of each, are written.
    """

    spec: TableSpec
    pieces: Path
    tables: Path
    table_of: dict[str, int]
    fitted: Fitted
    data: Path
    done: Path

    def __call__(self, shard: Shard) -> dict[str, int]:
        """Write a shard; an existing one is not written again.

        Returns:
            By feature, ids that are not row 0.
        """
        path, done = self.data / shard.split / shard.name, self.done / f"{shard.split}-{shard.number:06d}.json"
        if (before := _finished(done, path)) is not None:
            return before
        known = Counter[str]()
        path.parent.mkdir(parents=True, exist_ok=True)
        with renamed_to(path, beside=done) as partial:
            writer: pq.ParquetWriter | None = None
            for rows in _groups(self._tables(shard, known)):
                writer = writer or pq.ParquetWriter(partial, rows.schema, compression="zstd")
                writer.write_table(rows, row_group_size=ROWS_PER_GROUP)
            assert writer is not None
            writer.close()
            size = partial.stat().st_size
        write_whole(done, json.dumps({"known": known, "size": size}).encode())
        return dict(known)

    def _tables(self, shard: Shard, known: Counter[str]) -> Iterator[pa.Table]:
        look_ups = {number: LookUp(look_up_file(self.tables, number)) for number in set(self.table_of.values())}
        for piece, start, end in shard.slices:
            [words] = Mapped(piece.path(self.pieces, "words")).batches
            [rows] = Mapped(piece.path(self.pieces, "rows")).batches
            columns: dict[str, pa.Array] = {}
            row_of: dict[str, NDArray[np.int64]] = {}
            for name, column in self.spec.looked_up.items():
                values = words.column(f"{name}:values").flatten()
                if isinstance(column, Bucketised):
                    found = buckets(values.to_numpy(), self.fitted.boundaries[name])
                else:
                    found = look_ups[self.table_of[name]].rows(values)
                row_of[name] = np.append(found, 0)
            for first in range(start, end, ROWS_PER_GROUP):
                some = rows.slice(first, min(ROWS_PER_GROUP, end - first))
                for name in rows.schema.names:
                    columns[name] = some.column(name)
                    if name in row_of:
                        columns[name] = ids = _encoded(some.column(name), row_of[name], self.spec, name)
                        flat = ids.flatten() if isinstance(self.spec.columns[name], Lists) else ids
                        known[name] += int(np.count_nonzero(flat.to_numpy(zero_copy_only=False)))
                    elif name in self.fitted.moments:
                        exact = some.column(name).to_numpy()
                        columns[name] = pa.array(standardised(name, exact, *self.fitted.moments[name]))
                yield pa.table(columns)


def _encoded(places: pa.Array, row_of: NDArray[np.int64], spec: TableSpec, name: str) -> pa.Array:
    if not isinstance(spec.columns[name], Lists):
        return pa.array(row_of[places.to_numpy()])
    offsets = pa.array(places.offsets.to_numpy() - places.offsets[0].as_py())
    return pa.ListArray.from_arrays(offsets, pa.array(row_of[places.flatten().to_numpy()]))


def _groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of ROWS_PER_GROUP, except the last."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += table.num_rows
        while count >= ROWS_PER_GROUP:
            whole = pa.concat_tables(waiting)
            # In one chunk: the pages of parquet end where chunks do, which follow from the format of the input.
            yield whole.slice(0, ROWS_PER_GROUP).combine_chunks()
            waiting, count = [whole.slice(ROWS_PER_GROUP)], count - ROWS_PER_GROUP
    if count:
        yield pa.concat_tables(waiting).combine_chunks()


def _finished(done: Path, path: Path) -> dict[str, int] | None:
    try:
        value = json.loads(done.read_bytes())
        return value["known"] if path.stat().st_size == value["size"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
