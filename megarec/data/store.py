"""One split of a prepared data set as memory-mapped Arrow, with fast random access by row."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from megarec.data.batch import Ids, flat_positions
from megarec.data.cache import (
    ROWS_FILE,
    BadRows,
    Built,
    ensure_cache,
    list_column,
    weights_column,
)
from megarec.data.mapped import Damaged, MappedFile, Rows
from megarec.data.row_checksums import StoredRows, row_checksums
from megarec.data.schema import Schema, Split
from megarec.errors import UserError

Values = tuple[np.ndarray, Rows]  # of a list column, and the lengths of its lists


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

    def ensured(damaged: int | None) -> tuple[Path, Built]:
        return ensure_cache(path, split, schema, bad_rows, None if cache is None else Path(cache), damaged)

    return Store(ensured, schema)


class Store:
    """Random access to the rows of a Hugging Face dataset over one memory-mapped Arrow file.

    All columns lie in one file, in many record batches. Each column is read through a view of the whole mapped
    file: element = view[base[record batch] + offset in the record batch], one NumPy gather a column, whatever
    the number of record batches. Nothing is copied but the elements asked for, and every row that is read is compared
    with its checksum: a damaged cache is built anew, and the rows are read again.

    Args:
        ensure: gives the cache; given the inode of a damaged one, another (`ensure_cache`).

    Attributes:
        dataset: the Hugging Face dataset; it keeps the file mapped.
        skipped: rows left out under bad_rows="skip", by reason.

    Raises:
        UserError: a cache built a moment ago is damaged as well; also from `gather`.
    """

    dataset: datasets.Dataset
    skipped: dict[str, int]

    def __init__(self, ensure: Callable[[int | None], tuple[Path, Built]], schema: Schema) -> None:
        self._ensure = ensure
        self._singles = [f.name for f in schema.categorical if not f.multi_valued]
        self._lists = [f.name for f in schema.categorical if f.multi_valued]
        self._weighted = [f.name for f in schema.categorical if f.weighted]
        self._order = [f.name for f in schema.categorical]
        self._numeric_width = len(schema.numeric)
        self._open(None)

    def __len__(self) -> int:
        return self.dataset.num_rows

    def _open(self, damaged: int | None) -> None:
        for _ in range(2):
            directory, built = self._ensure(damaged)
            self._path = directory / ROWS_FILE
            self._inode = damaged = self._path.stat().st_ino
            try:
                dataset = datasets.Dataset.from_file(str(self._path))
                self._file = MappedFile(dataset.data.table)
                if self._file.layout == built.layout:
                    self.dataset, self.skipped, self._salt = dataset, built.skipped, built.salt
                    return
            except (Damaged, pa.ArrowException, OSError, ValueError, TypeError, KeyError):
                pass  # whatever a reader makes of damaged bytes: they are not what was written
        raise self._damaged_again()

    def _damaged_again(self) -> UserError:
        return UserError(f"{self._path} is damaged just after it was built: check this machine's disk and memory")

    def gather(self, rows: Rows) -> tuple[Tensor, dict[str, Ids], Tensor]:
        """Numeric float32 [B, F], ids by feature in schema order, labels float32 [B] of these rows.

        Args:
            rows: int64 [B] in [0, len(self)); repeated rows are fine.
        """
        assert rows.size == 0 or (rows.min() >= 0 and rows.max() < len(self)), "rows outside the split"
        try:
            stored = self._read(rows)
        except (Damaged, IndexError):
            self._open(self._inode)
            try:
                stored = self._read(rows)
            except (Damaged, IndexError) as error:
                raise self._damaged_again() from error
        ids: dict[str, Ids] = {}
        if stored.singles is not None:
            ids.update((name, Ids(torch.from_numpy(stored.singles[i]))) for i, name in enumerate(self._singles))
        weights = dict(zip(self._weighted, stored.lists[len(self._lists) :], strict=True))
        for name, (values, lengths) in zip(self._lists, stored.lists, strict=False):
            weighted = torch.from_numpy(weights[name][0]) if name in weights else None
            ids[name] = Ids(torch.from_numpy(values), torch.from_numpy(lengths), weighted)
        numeric = np.empty((len(rows), 0), np.float32) if stored.numeric is None else stored.numeric
        return torch.from_numpy(numeric), {name: ids[name] for name in self._order}, torch.from_numpy(stored.label)

    def _read(self, rows: Rows) -> StoredRows:
        """Raises Damaged or IndexError where a row is not what was written."""
        batch = np.searchsorted(self._file.starts, rows, side="right") - 1
        within = rows - self._file.starts[batch]
        singles = numeric = None
        if width := len(self._singles):
            singles = self._file.read("ids", 1, np.int64, batch, within * width + np.arange(width)[:, None])
        if width := self._numeric_width:
            numeric = self._file.read(
                "numeric", 1, np.float32, batch[:, None], (within * width)[:, None] + np.arange(width)
            )
        stored = StoredRows(
            self._file.read("label", 0, np.float32, batch, within),
            singles,
            numeric,
            (
                *(self._jagged(list_column(name), np.int64, batch, within) for name in self._lists),
                *(self._jagged(weights_column(name), np.float32, batch, within) for name in self._weighted),
            ),
        )
        expected = self._file.read("checksum", 0, np.int32, batch, within)
        if (row_checksums(self._salt, rows, stored) != expected).any():
            raise Damaged("a row has another checksum")
        return stored

    def _jagged(self, column: str, kind: type[np.generic], batch: Rows, within: Rows) -> Values:
        """Values [sum(lengths)] and lengths int64 [B] of a list column, at these rows of these record batches."""
        start = self._file.read(column, 0, np.int32, batch, within).astype(np.int64)
        stop = self._file.read(column, 0, np.int32, batch, within + 1)
        lengths = stop - start
        if (lengths < 0).any() or (start < 0).any() or (stop > self._file.elements(column, 1, kind, batch)).any():
            raise Damaged(f"lists of {column}")  # before so many values are allocated
        return self._file.read(column, 1, kind, np.repeat(batch, lengths), flat_positions(start, lengths)), lengths
