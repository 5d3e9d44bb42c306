"""One split of a prepared data set as memory-mapped Arrow, with fast random access by row."""

from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from megarec.data.assembler import Assembler
from megarec.data.batch import Batch, Ids
from megarec.data.cache import ROWS_FILE, BadRows, Built, ensure_cache
from megarec.data.mapped import Damaged, MappedFile, Rows
from megarec.data.schema import Schema, Split, check_labelled
from megarec.errors import UserError


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
    check_labelled(path, schema)

    def ensured(damaged: int | None) -> tuple[Path, Built]:
        return ensure_cache(path, split, schema, bad_rows, None if cache is None else Path(cache), damaged)

    return Store(ensured, schema)


class Store:
    """Random access to the rows of a Hugging Face dataset over one memory-mapped Arrow file.

    Every row that is read is compared with its checksum: a damaged cache is rebuilt, and the rows are read again.

    Args:
        ensure: gives the cache; given the inode of a damaged one, another (`ensure_cache`).

    Attributes:
        dataset: the Hugging Face dataset; it keeps the file mapped.
        skipped: rows left out under bad_rows="skip", by reason.
        labels: those that occur, in order.

    Raises:
        UserError: a cache built a moment ago is damaged as well; also from `read`.
    """

    dataset: datasets.Dataset
    skipped: dict[str, int]
    labels: list[float]

    def __init__(self, ensure: Callable[[int | None], tuple[Path, Built]], schema: Schema) -> None:
        self._ensure = ensure
        self._assembler = Assembler(schema)
        self._open(None)

    def __len__(self) -> int:
        return self.dataset.num_rows

    def arrange(self, names: Sequence[str], together: Sequence[Sequence[str]] = ()) -> None:
        """Let the ids of batches lie in this order of features (`Assembler.arrange`)."""
        self._assembler.arrange(names, together)

    def _open(self, damaged: int | None) -> None:
        for _ in range(2):
            directory, built = self._ensure(damaged)
            self._path = directory / ROWS_FILE
            self._inode = damaged = self._path.stat().st_ino
            try:
                dataset = datasets.Dataset.from_file(str(self._path))
                self._file = MappedFile(dataset.data.table, self._assembler.layout)
                if self._file.layout == built.layout:
                    self.dataset, self.skipped = dataset, built.skipped
                    self.labels, self._salt = built.labels, built.salt
                    return
            except (Damaged, pa.ArrowException, OSError, ValueError, TypeError, KeyError):
                pass  # any error that damaged bytes cause: they are not what was written
        raise self._damaged_again()

    def _damaged_again(self) -> UserError:
        return UserError(f"{self._path} is damaged just after it was built: check this machine's disk and memory")

    def gather(self, rows: Rows) -> tuple[Tensor, dict[str, Ids], Tensor]:
        """Numeric float32 [B, F], ids by feature in schema order, labels float32 [B] of these rows.

        Args:
            rows: int64 [B] in [0, len(self)); repeated rows are fine.
        """
        batch = self.read(rows, rows, len(rows), pinned=False)
        return batch.numeric, batch.ids, batch.labels

    def read(self, rows: Rows, keys: NDArray[np.int64], valid: int, pinned: bool) -> Batch:
        """These rows as a batch in one buffer; its ids in the order set by `arrange`.

        Args:
            rows: int64 [B] in [0, len(self)); repeated rows are fine.
            keys, valid: the batch's.
            pinned: in page-locked memory; needs CUDA.

        Raises:
            UserError: lists that `arrange` called equally long are not.
        """
        assert rows.size == 0 or (rows.min() >= 0 and rows.max() < len(self)), "rows outside the split"
        try:
            return self._assembler.read(self._file, rows, (self._salt, rows), keys, valid, pinned)
        except (Damaged, IndexError):
            self._open(self._inode)
            try:
                return self._assembler.read(self._file, rows, (self._salt, rows), keys, valid, pinned)
            except (Damaged, IndexError) as error:
                raise self._damaged_again() from error
