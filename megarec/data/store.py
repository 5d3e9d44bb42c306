"""One split of a prepared data set as memory-mapped Arrow, with fast random access by row."""

from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarec.data.batch import Batch, Ids, carve
from megarec.data.cache import ROWS_FILE, BadRows, Built, ensure_cache
from megarec.data.jagged import BlockReader
from megarec.data.mapped import Damaged, MappedFile, Rows
from megarec.data.records import RecordLayout
from megarec.data.schema import Schema, Split
from megarec.errors import UserError

_TILE_BYTES = 3 << 19  # of records at a time, which stay in the cache while they are turned
_FEWEST_ROWS = 64  # of a tile


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
    if not schema.labelled:
        raise UserError(
            f"{path}: was prepared from files without the label column {schema.label!r}: it can be scored, not trained "
            "on or evaluated; prepare files that have it"
        )

    def ensured(damaged: int | None) -> tuple[Path, Built]:
        return ensure_cache(path, split, schema, bad_rows, None if cache is None else Path(cache), damaged)

    return Store(ensured, schema)


class Store:
    """Random access to the rows of a Hugging Face dataset over one memory-mapped Arrow file.

    A row is one record (records.py): reading B rows is B copies. They are made tile by tile, each tile is turned, so
    that a batch has its ids feature after feature, and nothing is copied again. Every row that is read is compared
    with its checksum: a damaged cache is built anew, and the rows are read again.

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
        self._layout = RecordLayout(schema)
        self._names = [f.name for f in schema.categorical]
        self.arrange(self._names)
        self._open(None)

    def __len__(self) -> int:
        return self.dataset.num_rows

    def arrange(self, names: Sequence[str]) -> None:
        """Let the ids of batches lie in this order of features, so that whoever sends them need not copy them.

        Args:
            names: of categorical features; those that it lacks come last, those that nobody has do not count.
        """
        order = {name: place for place, name in enumerate(dict.fromkeys([*names, *self._names]))}
        self._singles = sorted(self._layout.singles, key=order.__getitem__)
        self._lists = sorted(self._layout.lists, key=order.__getitem__)
        place = {name: row for row, name in enumerate([*self._singles, *self._lists])}
        self._rows_of = np.array([place[name] for name in [*self._layout.singles, *self._layout.lists]], np.int64)
        named = [[self._layout.lists[number] for number in block.lists] for block in self._layout.blocks]
        self._weighted = sorted(named[1], key=order.__getitem__) if len(named) > 1 else []
        self._orders = [np.argsort([order[name] for name in names]) for names in named]

    def _open(self, damaged: int | None) -> None:
        for _ in range(2):
            directory, built = self._ensure(damaged)
            self._path = directory / ROWS_FILE
            self._inode = damaged = self._path.stat().st_ino
            try:
                dataset = datasets.Dataset.from_file(str(self._path))
                self._file = MappedFile(dataset.data.table, self._layout)
                if self._file.layout == built.layout:
                    self.dataset, self.skipped = dataset, built.skipped
                    self.labels, self._salt = built.labels, built.salt
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
        batch = self.read(rows, rows, len(rows), pinned=False)
        return batch.numeric, batch.ids, batch.labels

    def read(self, rows: Rows, keys: NDArray[np.int64], valid: int, pinned: bool) -> Batch:
        """These rows as a batch in one buffer; its ids lie as `arrange` said.

        Args:
            rows: int64 [B] in [0, len(self)); repeated rows are fine.
            keys, valid: the batch's.
            pinned: in page-locked memory; needs CUDA.
        """
        assert rows.size == 0 or (rows.min() >= 0 and rows.max() < len(self)), "rows outside the split"
        try:
            return self._read(rows, keys, valid, pinned)
        except (Damaged, IndexError):
            self._open(self._inode)
            try:
                return self._read(rows, keys, valid, pinned)
            except (Damaged, IndexError) as error:
                raise self._damaged_again() from error

    def _read(self, rows: Rows, keys: NDArray[np.int64], valid: int, pinned: bool) -> Batch:
        """Raises Damaged or IndexError where a row is not what was written."""
        layout, size = self._layout, len(rows)
        batch, at = self._file.find(rows)
        blocks = [
            BlockReader(self._file, layout, number, order, batch, at) for number, order in enumerate(self._orders)
        ]
        ids = torch.int32 if layout.id_kind.itemsize == 4 else torch.int64
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((size,), torch.int64), ((len(self._rows_of), size), ids)]
        shapes += [((size, len(layout.schema.numeric)), torch.float32), ((size,), torch.float32)]
        shapes += [((reader.size,), kind) for reader, kind in zip(blocks, (ids, torch.float32), strict=False)]
        buffer, (of_rows, integers, numeric, labels, *jagged) = carve(shapes, pinned)
        of_rows.numpy()[:] = keys
        turned, numbers, outcomes = integers.numpy(), numeric.numpy(), labels.numpy()
        step = max(_FEWEST_ROWS, _TILE_BYTES // (8 * layout.words))
        for start in range(0, size, step):
            tile = slice(start, start + step)
            records = self._file.records[at[tile]]
            if (layout.checksums(self._salt, rows[tile], records) != records[:, -1]).any():
                raise Damaged("a row has another checksum")
            turned[self._rows_of, tile] = layout.integers(records).T
            floats = layout.floats(records)
            numbers[tile], outcomes[tile] = floats[:, :-1], floats[:, -1]
            for reader in blocks:
                reader.take(tile, records)
        parts = [list(values.split(reader.join(values.numpy()))) for reader, values in zip(blocks, jagged, strict=True)]
        found = self._by_name(integers, parts)
        return Batch(numeric, {name: found[name] for name in self._names}, labels, of_rows, valid, buffer)

    def _by_name(self, integers: Tensor, parts: Sequence[list[Tensor]]) -> dict[str, Ids]:
        """The ids of a batch.

        Args:
            integers: [features, B], ids of single-valued ones and lengths of lists.
            parts: of each block, what its lists hold.
        """
        values, lengths = integers.split([len(self._singles), len(self._lists)])
        found = {name: Ids(own) for name, own in zip(self._singles, values.unbind(), strict=True)}
        weights = dict(zip(self._weighted, parts[1], strict=True)) if self._weighted else {}
        for name, own, length in zip(self._lists, parts[0] if parts else (), lengths.unbind(), strict=True):
            found[name] = Ids(own, length, weights.get(name))
        return found
