"""NumPy views of a memory-mapped Arrow file of records and blocks (records.py), for random access by row."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_64

from megarec.data.records import RECORD, RecordLayout

Rows = NDArray[np.int64]
_WORD = 8


class Damaged(Exception):
    """A cache's content is not what was built."""


class MappedFile:
    """Where in the file each column's values begin, per record batch, and views of the whole file.

    The views have elements of one size and begin at the file's first buffer, so that a row is found whatever the number
    of record batches: element = base[record batch] + place in the record batch.

    Attributes:
        rows: how many it has.
        layout: a checksum of all that a reader goes by: columns, types, rows and places of buffers.

    Raises:
        Damaged: it is not a file that cache.py writes.
    """

    def __init__(self, table: pa.Table, layout: RecordLayout) -> None:
        if not table.schema.equals(layout.arrow_schema):
            raise Damaged(f"columns {table.schema}")
        sizes = [batch.num_rows for batch in table.to_batches()]
        self.rows = sum(sizes)
        self._starts, self._words = np.cumsum([0, *sizes[:-1]]), layout.words
        buffers = {name: list(_values(name, table.column(name).chunks)) for name in table.column_names}
        filled = [buffer for column in buffers.values() for buffer in column if buffer is not None and buffer.size]
        if not filled:
            raise Damaged("no rows")
        first = min(buffer.address for buffer in filled)
        size = max(buffer.address + buffer.size for buffer in filled) - first
        self._mapped = pa.foreign_buffer(first, size, base=table)
        self._bases = {
            name: np.array([b.address - first if b is not None and b.size else 0 for b in column])
            for name, column in buffers.items()
        }
        self._sizes = {
            name: np.array([b.size if b is not None else 0 for b in column]) for name, column in buffers.items()
        }
        # Arrow aligns buffers to 8 bytes; a record batch whose records end early would let a window read beyond them.
        if any((bases % _WORD).any() for bases in self._bases.values()) or any(
            have != rows * self._words * _WORD for have, rows in zip(self._sizes[RECORD].tolist(), sizes, strict=True)
        ):
            raise Damaged("places of buffers")
        windows, size = self._mapped.size // _WORD - self._words + 1, self._words * _WORD
        # One element a record: NumPy copies it as a whole, in half the time of a row of a matrix.
        self._records = np.ndarray((windows,), np.dtype((np.void, size)), self._mapped, strides=(_WORD,))
        described = xxh3_64(repr((table.schema.names, table.schema.types, sizes)).encode())
        for numbers in (*self._bases.values(), *self._sizes.values()):
            described.update(numbers.astype(np.int64).tobytes())
        self.layout = described.hexdigest()

    def view(self, kind: np.dtype[Any]) -> NDArray[Any]:
        """The whole file from its first buffer on, as numbers of this kind."""
        return np.frombuffer(self._mapped, kind, self._mapped.size // kind.itemsize)

    def find(self, rows: Rows) -> tuple[Rows, Rows]:
        """Of these rows, the record batch and the word at which the record begins."""
        batch = np.searchsorted(self._starts, rows, side="right") - 1
        return batch, self._bases[RECORD][batch] // _WORD + (rows - self._starts[batch]) * self._words

    def records(self, at: Rows) -> NDArray[np.uint64]:
        """[B, words]: a copy of the records that begin at these words."""
        return self._records[at].view(np.uint64).reshape(len(at), self._words)

    def block(self, column: str, kind: np.dtype[Any], batch: Rows) -> tuple[Rows, Rows]:
        """Where in `view(kind)` a block of these record batches begins, and how many elements it has."""
        return self._bases[column][batch] // kind.itemsize, self._sizes[column][batch] // kind.itemsize


def _values(name: str, chunks: Iterable[pa.Array]) -> Iterable[pa.Buffer | None]:
    """The values of list columns, the last of their buffers (Arrow's columnar format, "buffer listing")."""
    for chunk in chunks:
        if chunk.offset or chunk.null_count:
            raise Damaged(f"column {name}")
        yield chunk.buffers()[-1]
