"""One split of a prepared data set as memory-mapped Arrow, with fast random access by row."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarec.data.batch import Ids, flat_positions
from megarec.data.cache import ROWS_FILE, BadRows, ensure_cache, list_column, weights_column
from megarec.data.schema import Schema, Split

Rows = NDArray[np.int64]
_STORED: tuple[type[np.generic], ...] = (np.int32, np.int64, np.float32)


def open_split(path: Path, split: Split, schema: Schema, bad_rows: BadRows, cache: str | Path | None = None) -> "Store":
    """The rows of a split that `tools/prepare_data.py` wrote; checked and cached at first use.

    Args:
        path: the data set's directory.
        schema: the features to read: the data set's schema, or a selection of it.
        bad_rows: a row with a bad id, number or label: "error" stops, "skip" leaves it out and counts it.
        cache: a directory for the cached rows; None: in the data set's own (`.arrow/`).

    Raises:
        UserError: names the file, row, column and value of the first bad row, and the remedy; or what is missing.
    """
    directory, built = ensure_cache(path, split, schema, bad_rows, None if cache is None else Path(cache))
    return Store(datasets.Dataset.from_file(str(directory / ROWS_FILE)), schema, built.skipped)


class Store:
    """Random access to the rows of a Hugging Face dataset over one memory-mapped Arrow file.

    All columns lie in one file, in many record batches. Each column is read through a view of the whole mapped
    file: element = view[base[record batch] + offset in the record batch], one NumPy gather a column, whatever
    the number of record batches. Nothing is copied but the elements asked for.

    Attributes:
        dataset: the Hugging Face dataset; it keeps the file mapped.
        skipped: rows left out under bad_rows="skip", by reason.
    """

    def __init__(self, dataset: datasets.Dataset, schema: Schema, skipped: dict[str, int]) -> None:
        self.dataset = dataset
        self.skipped = skipped
        self._singles = [f.name for f in schema.categorical if not f.multi_valued]
        self._lists = [f.name for f in schema.categorical if f.multi_valued]
        self._weighted = {f.name for f in schema.categorical if f.weighted}
        self._order = [f.name for f in schema.categorical]
        self._numeric_width = len(schema.numeric)
        table = dataset.data.table
        sizes = [batch.num_rows for batch in table.to_batches()]
        self._starts = np.cumsum([0, *sizes[:-1]])
        self._file = _MappedFile(table)

    def __len__(self) -> int:
        return self.dataset.num_rows

    def gather(self, rows: Rows) -> tuple[Tensor, dict[str, Ids], Tensor]:
        """Numeric float32 [B, F], ids by feature in schema order, labels float32 [B] of these rows.

        Args:
            rows: int64 [B] in [0, len(self)); repeated rows are fine.
        """
        assert rows.size == 0 or (rows.min() >= 0 and rows.max() < len(self)), "rows outside the split"
        batch = np.searchsorted(self._starts, rows, side="right") - 1
        within = rows - self._starts[batch]
        label = self._file.read("label", 0, np.float32, batch, within)

        ids: dict[str, Ids] = {}
        if self._singles:
            width = len(self._singles)
            columns = self._file.read("ids", 1, np.int64, batch, within * width + np.arange(width)[:, None])
            ids.update((name, Ids(torch.from_numpy(columns[i]))) for i, name in enumerate(self._singles))
        for name in self._lists:
            values, lengths = self._jagged(list_column(name), np.int64, batch, within)
            weights = None
            if name in self._weighted:
                weights = torch.from_numpy(self._jagged(weights_column(name), np.float32, batch, within)[0])
            ids[name] = Ids(torch.from_numpy(values), torch.from_numpy(lengths), weights)

        width = self._numeric_width
        if width:
            numeric = self._file.read(
                "numeric", 1, np.float32, batch[:, None], (within * width)[:, None] + np.arange(width)
            )
        else:
            numeric = np.empty((len(rows), 0), np.float32)
        return torch.from_numpy(numeric), {name: ids[name] for name in self._order}, torch.from_numpy(label)

    def _jagged(
        self, column: str, kind: type[np.generic], batch: Rows, within: Rows
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Values [sum(lengths)] and lengths int64 [B] of a list column, at these rows of these record batches."""
        start = self._file.read(column, 0, np.int32, batch, within).astype(np.int64)
        lengths = self._file.read(column, 0, np.int32, batch, within + 1) - start
        return self._file.read(column, 1, kind, np.repeat(batch, lengths), flat_positions(start, lengths)), lengths


class _MappedFile:
    """NumPy views of the mapped file, and where in it each column's buffers begin, per record batch.

    Level 0 of a list column is its offsets; level 1, and a plain column's level 0, is data.
    """

    def __init__(self, table: pa.Table) -> None:
        buffers = {}
        for name in table.column_names:
            chunks = table.column(name).chunks
            assert all(chunk.offset == 0 and chunk.null_count == 0 for chunk in chunks)
            buffers[name, 0] = [chunk.buffers()[1] for chunk in chunks]  # Arrow's columnar format, "buffer listing"
            buffers[name, 1] = [chunk.buffers()[-1] for chunk in chunks]
        filled = [buffer for column in buffers.values() for buffer in column if buffer is not None and buffer.size]
        first = min(buffer.address for buffer in filled)
        size = max(buffer.address + buffer.size for buffer in filled) - first
        mapped = pa.foreign_buffer(first, size, base=table)
        self._views = {kind: np.frombuffer(mapped, kind, size // np.dtype(kind).itemsize) for kind in _STORED}
        self._bases = {
            column: np.array([b.address - first if b is not None and b.size else 0 for b in column_buffers])
            for column, column_buffers in buffers.items()
        }

    def read(self, column: str, level: int, kind: type[np.generic], batch: Rows, element: Rows) -> NDArray[Any]:
        """Elements of a column's buffers in these record batches; `batch` and `element` broadcast."""
        width = np.dtype(kind).itemsize
        return self._views[kind][self._bases[column, level][batch] // width + element]
