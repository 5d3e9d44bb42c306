"""A row of a cache as one record: an example's data are contiguous, so that reading it is one copy.

    [ids of single-valued features | lengths of lists | numeric | labels | weight | padding | spans of the blocks |
     checksum]

in 64-bit words. Of labels and weight there are those in use; a label that is missing is NaN. Ids and lengths are int32
where every table is small enough, else int64. What a row's lists hold lies in blocks outside the records, all lists of
a row one after another: one block of ids, one of weights. A span says where: first and last element (counted from the
record batch's first) and the XXH3 of what is there.

The checksum covers the record and its place, and every read of a row compares it and the hashes: no row that
changed on its way through disk and memory is trained on, and nothing is read that is not needed. It is linear in the
words modulo 2^64, with odd factors, so that a change of a single word always shows, and then mixed. It is made against
accidents, not against forgery.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from megarec.data.batch import flat_positions
from megarec.data.row_checks import as_numbers
from megarec.data.schema import Schema

RECORD = "record"
_ROWS_TURNED = 128
UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(x: UInt64) -> UInt64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits, well mixed."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Block:
    """What the lists of all rows hold, of one kind.

    Attributes:
        column: of the cache.
        kind: int32, int64 or float32.
        lists: places of its lists among all lists.
    """

    column: str
    kind: np.dtype[Any]
    lists: tuple[int, ...]


@dataclass(frozen=True)
class RecordLayout:
    """The layout of a record, for the features of a schema."""

    schema: Schema

    @cached_property
    def singles(self) -> list[str]:
        return [f.name for f in self.schema.categorical if not f.multi_valued]

    @cached_property
    def lists(self) -> list[str]:
        return [f.name for f in self.schema.categorical if f.multi_valued]

    @cached_property
    def id_kind(self) -> np.dtype[Any]:
        """Of ids and lengths."""
        return np.dtype(np.int32 if all(f.rows < 2**31 for f in self.schema.categorical) else np.int64)

    @cached_property
    def blocks(self) -> list[Block]:
        features = [f for f in self.schema.categorical if f.multi_valued]
        weighted = tuple(place for place, feature in enumerate(features) if feature.weighted)
        blocks = [Block("ids", self.id_kind, tuple(range(len(features)))), Block("weights", np.dtype("f4"), weighted)]
        return [block for block in blocks if block.lists]

    @cached_property
    def words(self) -> int:
        """Of a record, the checksum with them."""
        return self._spans + 3 * len(self.blocks) + 1

    @property
    def _integers(self) -> int:
        return len(self.singles) + len(self.lists)

    @cached_property
    def _spans(self) -> int:
        """The word at which the spans begin."""
        return -(-(self._integers * self.id_kind.itemsize + 4 * len(self.schema.numbers)) // 8)

    def integers(self, records: UInt64) -> NDArray[Any]:
        """[B, ids of single-valued features, then lengths of lists]: a view."""
        return records.view(self.id_kind)[:, : self._integers]

    def floats(self, records: UInt64) -> NDArray[np.float32]:
        """[B, numeric features, then labels and weight in use]: a view."""
        first = self._integers * self.id_kind.itemsize // 4
        return records.view(np.float32)[:, first : first + len(self.schema.numbers)]

    def lengths(self, records: UInt64) -> NDArray[Any]:
        """[B, lists]: a view."""
        return self.integers(records)[:, len(self.singles) :]

    def span_column(self, block: int) -> int:
        """The word at which a block's span begins."""
        return self._spans + 3 * block

    def spans(self, records: UInt64, block: int) -> UInt64:
        """[B, 3]: first element of the rows' lists in a block, the one after the last, and the hash: a view."""
        return records[:, self.span_column(block) : self.span_column(block) + 3]

    def checksums(self, salt: int, rows: Int64, records: UInt64) -> UInt64:
        """[B]: the checksums, the last words of these records.

        Args:
            salt: of the cache, in [0, 2^64): a row of another one has other checksums.
            rows: int64 [B], their places in the cache.
        """
        total: UInt64 = np.einsum("ij,j->i", records[:, :-1], self._factors)
        return mix64(total + rows.view(np.uint64) * _GOLDEN + np.uint64(salt))

    @cached_property
    def _factors(self) -> UInt64:
        return mix64(np.arange(1, self.words, dtype=np.uint64) * _GOLDEN) | np.uint64(1)

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """Of the cache's file."""
        fields = [(RECORD, pa.list_(pa.int32(), 2 * self.words))]
        fields += [(block.column, pa.list_(pa.from_numpy_dtype(block.kind))) for block in self.blocks]
        return pa.schema(fields)

    def pack(self, batch: pa.RecordBatch, salt: int, first: int) -> pa.RecordBatch:
        """Checked rows of a shard as a record batch of the cache, from its row `first` on."""
        records = np.zeros((len(batch), self.words), np.uint64)
        _turn([as_numbers(batch.column(name), self.id_kind.type) for name in self.singles], self.integers(records))
        absent = dict.fromkeys(self.schema.optional, np.nan)
        numbers = [as_numbers(batch.column(name), np.float32, absent.get(name, 0)) for name in self.schema.numbers]
        _turn(numbers, self.floats(records))
        features = [f for f in self.schema.categorical if f.multi_valued]
        lengths = self.lengths(records)
        for place, feature in enumerate(features):
            lengths[:, place] = pc.list_value_length(batch.column(feature.name)).to_numpy(zero_copy_only=False)
        columns = []
        for number, block in enumerate(self.blocks):
            named = [features[place] for place in block.lists]
            lists = [f.weights_column if block.column == "weights" else f.name for f in named]
            values = [batch.column(name).flatten().to_numpy(zero_copy_only=False) for name in lists]
            of_block = lengths[:, list(block.lists)].astype(np.int64)
            offsets, stored = _row_after_row(values, of_block, block.kind)
            spans = self.spans(records, number)
            spans[:, 0], spans[:, 1] = offsets[:-1], offsets[1:]
            data, cuts = stored.view(np.uint8).data, (offsets * block.kind.itemsize).tolist()
            spans[:, 2] = hashes([data[start:stop] for start, stop in itertools.pairwise(cuts)])
            columns.append(pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(stored)))
        records[:, -1] = self.checksums(salt, np.arange(first, first + len(batch)), records)
        column = pa.FixedSizeListArray.from_arrays(pa.array(records.view(np.int32).reshape(-1)), 2 * self.words)
        return pa.RecordBatch.from_arrays([column, *columns], schema=self.arrow_schema)


def hashes(rows: Sequence[memoryview]) -> UInt64:
    """XXH3 of every row's part of a block: a fifth of a microsecond a row."""
    return np.fromiter(map(xxh3_64_intdigest, rows), np.uint64, len(rows))


def _turn(columns: Sequence[NDArray[Any]], out: NDArray[Any]) -> None:
    """Columns into the first columns of a matrix of rows, some rows at a time, which stay in the processor's cache."""
    if columns:
        stacked = np.stack(columns)
        for start in range(0, len(out), _ROWS_TURNED):
            rows = slice(start, start + _ROWS_TURNED)
            out[rows, : len(columns)] = stacked[:, rows].T


def _row_after_row(values: Sequence[NDArray[Any]], lengths: Int64, kind: np.dtype[Any]) -> tuple[Int64, NDArray[Any]]:
    """Values by list, lengths [B, lists] -> where each row's begin [B + 1], and the values row after row."""
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(axis=1))]).astype(np.int64)
    begins = np.cumsum(lengths, axis=1) - lengths + offsets[:-1, None]
    stored = np.empty(offsets[-1], kind)
    stored[flat_positions(begins.T.reshape(-1), lengths.T.reshape(-1))] = np.concatenate(values)
    return offsets, stored
