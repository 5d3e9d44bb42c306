"""NumPy views of a memory-mapped Arrow file, for random access by row."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_64

Rows = NDArray[np.int64]
_STORED: tuple[type[np.generic], ...] = (np.int32, np.int64, np.float32)


class Damaged(Exception):
    """What a cache holds is not what was built."""


class MappedFile:
    """Where in the file each column's buffers begin, per record batch, and views of the whole file.

    Level 0 of a list column is its offsets; level 1, and a plain column's level 0, is data.

    Attributes:
        starts: int64, the first row of each record batch.
        layout: a checksum of all that a reader goes by: columns, types, rows and places of buffers.

    Raises:
        Damaged: it is no file that cache.py writes.
    """

    def __init__(self, table: pa.Table) -> None:
        sizes = [batch.num_rows for batch in table.to_batches()]
        self.starts = np.cumsum([0, *sizes[:-1]])
        buffers = {}
        for name in table.column_names:
            chunks = table.column(name).chunks
            if any(chunk.offset or chunk.null_count for chunk in chunks):
                raise Damaged(f"column {name}")
            buffers[name, 0] = [chunk.buffers()[1] for chunk in chunks]  # Arrow's columnar format, "buffer listing"
            buffers[name, 1] = [chunk.buffers()[-1] for chunk in chunks]
        filled = [buffer for column in buffers.values() for buffer in column if buffer is not None and buffer.size]
        if not filled:
            raise Damaged("no rows")
        first = min(buffer.address for buffer in filled)
        size = max(buffer.address + buffer.size for buffer in filled) - first
        mapped = pa.foreign_buffer(first, size, base=table)
        self._views = {kind: np.frombuffer(mapped, kind, size // np.dtype(kind).itemsize) for kind in _STORED}
        self._bases = {
            column: np.array([b.address - first if b is not None and b.size else 0 for b in column_buffers])
            for column, column_buffers in buffers.items()
        }
        self._sizes = {
            column: np.array([b.size if b is not None else 0 for b in column_buffers])
            for column, column_buffers in buffers.items()
        }
        described = xxh3_64(repr((table.schema.names, table.schema.types, sizes)).encode())
        for numbers in (*self._bases.values(), *self._sizes.values()):
            described.update(numbers.astype(np.int64).tobytes())
        self.layout = described.hexdigest()

    def read(self, column: str, level: int, kind: type[np.generic], batch: Rows, element: Rows) -> NDArray[Any]:
        """Elements of a column's buffers in these record batches; `batch` and `element` broadcast."""
        width = np.dtype(kind).itemsize
        return self._views[kind][self._bases[column, level][batch] // width + element]

    def elements(self, column: str, level: int, kind: type[np.generic], batch: Rows) -> Rows:
        """How many elements a column's buffer has in these record batches."""
        return self._sizes[column, level][batch] // np.dtype(kind).itemsize
