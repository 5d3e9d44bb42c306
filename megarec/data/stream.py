"""Training batches straight from the shards, for data that are larger than a disk for their cache.

An epoch puts the blocks of the split (blocks.py) in an order that follows from (seed, epoch), and cuts the rows of
that order into windows of whole batches, of at most `data.stream_rows` rows: only rows of one window share a batch.
A window of K batches gives each place of a batch K rows that lie side by side, one a batch, in an order that is the
place's own. So a rank, which has a slice of the places, reads a slice of the window, whatever the number of ranks,
and all ranks together read every row once. Only two windows are kept: the one that is trained on, and the next.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megarec.config.sections import DataConfig
from megarec.data.assembler import Assembler
from megarec.data.batch import Batch
from megarec.data.blocks import Blocks
from megarec.data.loader import EpochLoader, TrainLoader, example_keys, numbers_from, permuted, prefetched
from megarec.data.mapped import Damaged, MappedFile
from megarec.data.records import mix64
from megarec.data.schema import Schema, check_labelled
from megarec.data.store import open_split
from megarec.errors import UserError

Int64 = NDArray[np.int64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def open_training(data: DataConfig, schema: Schema, **loading: Any) -> EpochLoader:
    """The training batches of a rank: of a cache of all rows, or of a stream of them (`data.stream_rows`).

    Args:
        loading: the other fields of an `EpochLoader`.

    Raises:
        UserError: as of `store.open_split`, or the batches do not fit the rows.
    """
    path, cache = Path(data.path), None if data.cache is None else Path(data.cache)
    if data.stream_rows is None:
        return TrainLoader(open_split(path, "train", schema, data.bad_rows, cache), schema, **loading)
    check_labelled(path, schema)
    stream = Stream(Blocks(path, "train", schema, data.bad_rows, cache))
    return StreamLoader(stream, schema, rows=data.stream_rows, **loading)


class Window(NamedTuple):
    """Rows in memory.

    Attributes:
        file: their records, in whole pieces.
        places: int64 [n], of the window's rows in the file.
        numbers: int64 [n], which rows of the split they are.
    """

    file: MappedFile
    places: Int64
    numbers: Int64


class Stream:
    """The rows of a split, read by windows.

    Attributes:
        skipped, labels: as of a `Store`.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.skipped, self.labels = blocks.skipped, blocks.labels
        self._rows = int(blocks.sizes.sum())
        self._assembler = Assembler(blocks.layout.schema)
        self.arrange = self._assembler.arrange

    def __len__(self) -> int:
        return self._rows

    def window(self, order: Int64, start: int, count: int) -> Window:
        """That many rows of the blocks in this order, from row `start` of them on; after the last comes the first.

        Raises:
            UserError: a shard cannot be read, or is not what was checked.
        """
        layout, sink = self.blocks.layout, pa.BufferOutputStream()
        places, numbers, written = [], [], 0
        with pa.ipc.new_stream(sink, layout.arrow_schema) as stream:
            for block, first, stop in self._spans(order, start, count):
                before, packed = self.blocks.read(block, first, stop)
                places.append(np.arange(written + before, written + before + stop - first))
                numbers.append(np.arange(first, stop) + self.blocks.first(block))
                for batch in packed:
                    stream.write_batch(batch)
                    written += len(batch)
        with pa.ipc.open_stream(sink.getvalue()) as reader:
            file = MappedFile(reader.read_all(), layout)
        return Window(file, np.concatenate(places), np.concatenate(numbers))

    def _spans(self, order: Int64, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(block, its first row, the one after its last) of the rows of a window."""
        sizes = self.blocks.sizes[order]
        ends = np.cumsum(sizes)
        while count:
            start %= len(self)
            place = int(np.searchsorted(ends, start, side="right"))
            first = start - int(ends[place] - sizes[place])
            taken = min(count, int(sizes[place]) - first)
            yield int(order[place]), first, first + taken
            start, count = start + taken, count - taken

    def read(self, window: Window, rows: Int64, keys: Int64, pinned: bool) -> Batch:
        """These rows of a window as a batch, as `Store.read` makes one."""
        try:
            salted = self.blocks.salt, window.numbers[rows]
            return self._assembler.read(window.file, window.places[rows], salted, keys, len(rows), pinned)
        except (Damaged, IndexError) as error:
            raise UserError("rows changed in memory after they were checked: check this machine's memory") from error


@dataclass(frozen=True, kw_only=True)
class StreamLoader(EpochLoader):
    """Batches of the windows of a stream; global batch i is the i-th of an epoch on any number of ranks.

    Attributes:
        rows: of a window, at most, over all ranks.

    Raises:
        UserError: a window has no room for a batch.
    """

    store: Stream = field(kw_only=False)
    rows: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < self.batch_size:
            raise UserError(
                f"data.stream_rows={self.rows} is less than data.batch_size={self.batch_size}: the rows of a batch are "
                f"drawn from that many; set it to many batches, as data.stream_rows={100 * self.batch_size}"
            )

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from global batch `start` on: resuming is starting there."""
        return prefetched(self._batches(epoch, start), self.prefetch)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        for window, orders in prefetched(self._windows(epoch, start), 1):
            for rows in orders.T:
                yield self.store.read(
                    window, rows, example_keys(window.numbers[rows], self.seed, epoch), self.pin_memory
                )

    def _windows(self, epoch: int, start: int) -> Iterator[tuple[Window, Int64]]:
        """This rank's part of each window, and by place and batch the row there: int64 [share, batches]."""
        count = len(self.store.blocks.sizes)
        order = permuted(np.arange(count), count, self.seed, epoch)
        turned = int(numbers_from(self.seed, epoch, 3)[0] % np.uint64(len(self.store)))  # so that others are left over
        cuts = self._cuts()
        for first, stop in itertools.pairwise(cuts):
            if stop <= start:
                continue
            share = self.share * (stop - first)
            begin = first * self.batch_size + self.rank * share
            rank_rows = np.arange(begin, begin + share)
            drawn = mix64(rank_rows.view(np.uint64) * _GOLDEN + numbers_from(self.seed, epoch, 4))
            orders = drawn.reshape(self.share, -1).argsort(axis=1, kind="stable")
            orders += np.arange(0, share, stop - first)[:, None]
            yield self.store.window(order, turned + begin, share), orders[:, max(0, start - first) :]

    def _cuts(self) -> list[int]:
        """The first batch of each window, and the last one's end: as even as possible."""
        windows = -(-self.steps_per_epoch // (self.rows // self.batch_size))
        return [self.steps_per_epoch * window // windows for window in range(windows + 1)]
