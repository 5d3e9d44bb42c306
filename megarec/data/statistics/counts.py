"""One pass over the shards of a data set: how often every id, every list length and every number occurs.

Ids are counted exactly, by a number a row of the table. A table with more than RANGE_ROWS rows is counted range by
range, in one pass over its column each, so that memory does not grow with it. Numbers are rounded to the 16 bits of
bfloat16, relative error at most 0.4 %, and counted by these, so that quantiles need no sorting.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megarec.data.row_checks import as_numbers, check_columns
from megarec.data.schema import CategoricalFeature, Schema
from megarec.errors import UserError

Counts = NDArray[np.int64]
BATCH_ROWS = 1 << 16
RANGE_ROWS = 1 << 23  # 64 MiB of counts a split
LONGEST = 1000  # from here on lists are counted as one length
_KINDS = 1 << 16  # of a float's upper 16 bits
_SIGN = 1 << 15


@dataclass
class IdCounts:
    """What is counted of a categorical feature in one split.

    Attributes:
        ids: of every row of the table in the range at hand, how often it is there.
        after: the smallest id after that range; None: there is none.
        invalid: ids that are null or outside the table, and null lists; nothing else counts them.
        lengths: of lists: how many have that length, the last those with LONGEST or more.
        longest, elements: of lists: the largest length, the sum of all.
        weights: of weighted lists.
    """

    ids: Counts
    after: int | None = None
    invalid: int = 0
    lengths: Counts = field(default_factory=lambda: np.zeros(LONGEST + 1, np.int64))
    longest: int = 0
    elements: int = 0
    weights: "NumberCounts | None" = None

    def add(self, batch: pa.RecordBatch, feature: CategoricalFeature, first: int) -> None:
        """Count a feature of a batch.

        Args:
            first: of the range of ids that is counted; what is not of a range is counted with the one from 0.
        """
        column = batch.column(feature.name)
        if feature.weighted and first == 0:
            self.weights = self.weights or NumberCounts()
            self.weights.add(batch.column(feature.weights_column).flatten())
        if feature.multi_valued and first == 0:
            there = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
            lengths = there if not column.null_count else there[column.is_valid().to_numpy(zero_copy_only=False)]
            self.invalid += column.null_count
            if len(lengths):
                self.lengths += np.bincount(np.minimum(lengths, LONGEST), minlength=LONGEST + 1)
                self.longest = max(self.longest, int(lengths.max()))
                self.elements += int(lengths.sum())
        if feature.multi_valued:
            column = column.flatten()  # leaves out null lists
        if column.null_count:
            self.invalid += column.null_count if first == 0 else 0
            column = column.drop_null()
        ids = column.to_numpy(zero_copy_only=False)
        if not len(ids):
            return
        if ids.min() < 0 or ids.max() >= feature.rows:  # compared in the column's own type: no id wraps into range
            good = (ids >= 0) & (ids < feature.rows)
            self.invalid += len(ids) - int(np.count_nonzero(good)) if first == 0 else 0
            ids = ids[good]
        ids = ids.astype(np.int64, copy=False)
        if feature.rows > len(self.ids):
            end = first + len(self.ids)
            if len(later := ids[ids >= end]):
                self.after = min(int(later.min()), self.after or feature.rows)
            ids = ids[(ids >= first) & (ids < end)] - first
        np.add.at(self.ids, ids, 1)


@dataclass
class NumberCounts:
    """What is counted of numbers in one split.

    Attributes:
        bits: how many round to each bfloat16, by its bits.
        invalid: nulls, NaN and infinite ones; nothing else counts them.
        mean, squares: of all, in float64; the sum of squared distances from the mean.
    """

    bits: Counts = field(default_factory=lambda: np.zeros(_KINDS, np.int64))
    count: int = 0
    invalid: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: float = np.inf
    most: float = -np.inf

    def add(self, column: pa.Array) -> None:
        self.invalid += column.null_count
        numbers = as_numbers(column.drop_null() if column.null_count else column, np.float32)
        finite = np.isfinite(numbers)
        if not finite.all():
            self.invalid += len(numbers) - int(np.count_nonzero(finite))
            numbers = numbers[finite]
        if not (count := len(numbers)):
            return
        rounded = (np.ascontiguousarray(numbers).view(np.uint32) + np.uint32(1 << 15)) >> np.uint32(16)
        self.bits += np.bincount(rounded, minlength=_KINDS)
        exact = numbers.astype(np.float64)
        mean = float(exact.mean())
        exact -= mean
        both, apart = self.count + count, mean - self.mean
        self.squares += float(exact @ exact) + apart * apart * self.count * count / both
        self.mean += apart * count / both
        self.count = both
        self.least, self.most = min(self.least, float(numbers.min())), max(self.most, float(numbers.max()))

    def tally(self) -> tuple[NDArray[np.float64], Counts]:
        """The numbers that are there, rounded, in their order, and how often each is."""
        bits = np.flatnonzero(self.bits)
        values = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64) + 0.0  # -0 is 0
        values = np.clip(values, self.least, self.most)
        distinct, place = np.unique(values, return_inverse=True)
        counts = np.zeros(len(distinct), np.int64)
        np.add.at(counts, place, self.bits[bits])
        return distinct, counts


@dataclass
class LabelCounts:
    """Of a split: its rows, how many labels are 1, how many are 0 or 1, how many are missing."""

    rows: int = 0
    positive: int = 0
    count: int = 0
    missing: int = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Count a batch of no column but the label, or of none at all."""
        self.rows += batch.num_rows
        if batch.num_columns:
            column = batch.column(0)
            self.missing += column.null_count
            labels = as_numbers(column.drop_null() if column.null_count else column, np.float32)
            positive = int(np.count_nonzero(labels == 1))
            self.positive += positive
            self.count += positive + int(np.count_nonzero(labels == 0))


def shards_of(data: Path, schema: Schema) -> dict[str, list[Path]]:
    """The shards of every split that has some.

    Raises:
        UserError: there is none.
    """
    found = {split: sorted((data / split).glob("*.parquet")) for split in schema.rows}
    found = {split: shards for split, shards in found.items() if shards}
    if not found:
        raise UserError(f"{data} holds no *.parquet shard of {', '.join(schema.rows)}; prepare the data again")
    return found


def batches(shards: Sequence[Path], schema: Schema, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """These columns of shards, in batches of BATCH_ROWS rows.

    Raises:
        UserError: a shard cannot be read, or does not have the columns of the schema.
    """
    for path in shards:
        try:
            with pq.ParquetFile(path) as file:
                check_columns(path, file.schema_arrow, schema)
                yield from file.iter_batches(BATCH_ROWS, columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"{path}: cannot be read ({why}); prepare the data again") from error
