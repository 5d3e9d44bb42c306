"""Arrow files between the phases of a preparation: written batch by batch, mapped, and their pages given back.

A mapped page counts as memory of the process that touched it until it is given back. Counting and encoding go through
files that together are as large as the input, so they give pages back after each range or piece: memory is then bounded
by these.
"""

import ctypes
import functools
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megarec.files import renamed_to


def save(path: Path, columns: dict[str, pa.Array]) -> int:
    """Write one record batch; the file is there whole or not at all. Returns its size in bytes."""
    batch = pa.RecordBatch.from_pydict(columns)
    with renamed_to(path) as partial:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        return partial.stat().st_size


def one_row(values: pa.Array) -> pa.Array:
    """An array as the only row of a column of lists: arrays of different lengths then share a file."""
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


class Mapped:
    """The record batches of a file, mapped, not read.

    Attributes:
        batches: they keep the file mapped.
    """

    def __init__(self, path: Path) -> None:
        before = pa.total_allocated_bytes()
        self._bytes = pa.memory_map(str(path)).read_buffer()
        self._mapped = pa.total_allocated_bytes() == before
        reader = pa.ipc.open_file(pa.BufferReader(self._bytes))
        self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]

    def release(self) -> None:
        """Give its pages back; they are read again when they are touched."""
        # For memory without a file, this would discard the content.
        if self._mapped and self._bytes.size and self._bytes.address % mmap.PAGESIZE == 0 and (advise := _madvise()):
            advise(self._bytes.address, self._bytes.size, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's call; pyarrow has none, and Python's maps hold a file open each. None: there is none."""
    found = getattr(ctypes.CDLL(None), "madvise", None)
    if found is not None:
        found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found


class Runs:
    """An Arrow file of values and a number beside each, written range by range."""

    def __init__(self, path: Path, kind: pa.DataType, what: str) -> None:
        self._path, self._schema = path, pa.schema([("value", kind), (what, pa.int64())])

    def __enter__(self) -> "Runs":
        self._file = pa.OSFile(str(self._path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        return self

    def write(self, values: pa.Array, numbers: NDArray[np.int64]) -> None:
        if len(values):
            self._writer.write_batch(pa.record_batch([values, pa.array(numbers)], schema=self._schema))

    def __exit__(self, *error: Any) -> None:
        self._writer.close()
        self._file.close()
