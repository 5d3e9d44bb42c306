"""The lists of a batch, read tile by tile from a block of a cache (records.py), and handed out list after list."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megarec.data.mapped import Damaged, MappedFile, Rows
from megarec.data.records import RecordLayout, UInt64, hashes


class BlockReader:
    """What the lists of a batch's rows hold in one block.

    Args:
        number: of the block in the layout.
        order: of the block's lists in the batch.
        batch: int64 [B], the record batches of the rows.
        at: int64 [B], where in `file.records` they stand.

    Attributes:
        size: how many elements the rows have.

    Raises:
        Damaged: the rows cannot have such lists; from `take` as well, where they are not what was written.
    """

    def __init__(
        self, file: MappedFile, layout: RecordLayout, number: int, order: NDArray[np.int64], batch: Rows, at: Rows
    ) -> None:
        self._layout, self._number, self._block = layout, number, layout.blocks[number]
        self._first, elements = file.block(self._block.column, self._block.kind, batch)
        self._bytes = file.view(np.dtype(np.uint8)).data
        self._lists, self._order = np.array(self._block.lists, np.int64), order
        self._tiles: list[NDArray[Any]] = []
        self._cuts: list[list[int]] = []
        column = layout.span_column(number)
        words = file.view(np.dtype(np.int64))
        starts, stops = words[at + column], words[at + column + 1]
        if (starts < 0).any() or (starts > stops).any() or (stops > elements).any():
            raise Damaged(f"lists of {self._block.column}")  # before that many values are allocated
        self.size = int((stops - starts).sum())

    def take(self, tile: slice, records: UInt64) -> None:
        """Read the lists of these rows of the batch, whose records are right; tile after tile."""
        spans = self._layout.spans(records, self._number)
        starts, stops = (self._first[tile] + spans[:, column].view(np.int64) for column in (0, 1))
        size = self._block.kind.itemsize
        rows = [self._bytes[a:b] for a, b in zip((starts * size).tolist(), (stops * size).tolist(), strict=True)]
        if (hashes(rows) != spans[:, 2]).any():
            raise Damaged("lists with another hash")
        stored = np.frombuffer(b"".join(rows), self._block.kind)  # row after row, in the processor's cache
        kind = np.int32 if len(stored) < 2**31 else np.int64
        here = self._layout.lengths(records)[:, self._lists]
        ends: NDArray[Any] = np.cumsum(here, dtype=kind).reshape(here.shape).T[self._order].reshape(-1)
        lengths = here.T[self._order].reshape(-1)
        after: NDArray[Any] = np.cumsum(lengths, dtype=kind)
        places = np.repeat(ends - after, lengths)  # from where a list lies now to where it lay
        places += np.arange(len(stored), dtype=kind)
        self._tiles.append(stored.take(places))
        self._cuts.append([0, *after[len(here) - 1 :: len(here)].tolist()])

    def join(self, out: NDArray[Any]) -> list[int]:
        """All that was taken into `out` [size], list after list; returns how many elements each has."""
        parts = [
            tile[cuts[place] : cuts[place + 1]]
            for place in range(len(self._lists))
            for tile, cuts in zip(self._tiles, self._cuts, strict=True)
        ]
        if parts:
            np.concatenate(parts, out=out)
        return [sum(cuts[place + 1] - cuts[place] for cuts in self._cuts) for place in range(len(self._lists))]
