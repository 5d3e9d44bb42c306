"""Batches out of records: rows are copied tile by tile, each tile is turned, so that ids lie feature after feature."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarec.data.batch import Batch, Ids, carve
from megarec.data.jagged import BlockReader
from megarec.data.mapped import Damaged, MappedFile, Rows
from megarec.data.records import RecordLayout
from megarec.data.row_checks import check_equally_long
from megarec.data.schema import Schema

_TILE_BYTES = 3 << 19  # of records at a time, which stay in the cache while they are turned
_FEWEST_ROWS = 64  # of a tile


class Assembler:
    """Reads rows of a file of records (records.py) as a batch in one buffer.

    Reading B rows is B copies; nothing is copied again. Every row that is read is compared with its checksum.

    Attributes:
        layout: of the records.
    """

    def __init__(self, schema: Schema) -> None:
        self.layout = RecordLayout(schema)
        self._names = [f.name for f in schema.categorical]
        self.arrange(self._names)

    def arrange(self, names: Sequence[str], together: Sequence[Sequence[str]] = ()) -> None:
        """Let the ids of batches lie in this order of features, so that the sender need not copy them.

        Args:
            names: of categorical features; features not named come last, unknown names are ignored.
            together: lists that must be equally long in every row, as those of a sequence.
        """
        order = {name: place for place, name in enumerate(dict.fromkeys([*names, *self._names]))}
        self._singles = sorted(self.layout.singles, key=order.__getitem__)
        self._lists = sorted(self.layout.lists, key=order.__getitem__)
        place = {name: row for row, name in enumerate([*self._singles, *self._lists])}
        self._rows_of = np.array([place[name] for name in [*self.layout.singles, *self.layout.lists]], np.int64)
        self._pairs = [(first, other) for first, *others in together for other in others]
        self._together = [[place[name] for name in pair] for pair in self._pairs]
        named = [[self.layout.lists[number] for number in block.lists] for block in self.layout.blocks]
        self._weighted = sorted(named[1], key=order.__getitem__) if len(named) > 1 else []
        self._orders = [np.argsort([order[name] for name in names]) for names in named]

    def read(
        self,
        file: MappedFile,
        rows: Rows,
        checked: tuple[int, Rows],
        keys: NDArray[np.int64],
        valid: int,
        pinned: bool,
    ) -> Batch:
        """These rows of a file; ids in the order set by `arrange`.

        Args:
            rows: int64 [B] in [0, file.rows); repeated rows are fine.
            checked: the salt and the row numbers, int64 [B], that their checksums were made with.
            keys, valid: the batch's.
            pinned: in page-locked memory; needs CUDA.

        Raises:
            Damaged, IndexError: a row is not what was written.
            UserError: lists that `arrange` called equally long are not.
        """
        layout, size, (salt, numbers_of) = self.layout, len(rows), checked
        batch, at = file.find(rows)
        blocks = [BlockReader(file, layout, number, order, batch, at) for number, order in enumerate(self._orders)]
        ids = torch.int32 if layout.id_kind.itemsize == 4 else torch.int64
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((size,), torch.int64), ((len(self._rows_of), size), ids)]
        numeric_features, predicted = len(layout.schema.numeric), len(layout.schema.predicted)
        shapes += [((size, columns), torch.float32) for columns in (numeric_features, predicted)]
        shapes += [((size, 1), torch.float32)] * layout.schema.weighted
        floating = len(shapes)
        shapes += [((reader.size,), kind) for reader, kind in zip(blocks, (ids, torch.float32), strict=False)]
        buffer, (of_rows, integers, *others) = carve(shapes, pinned)
        of_rows.numpy()[:] = keys
        floats, jagged = others[: floating - 2], others[floating - 2 :]
        turned, parts_of_floats = integers.numpy(), [tensor.numpy() for tensor in floats]
        ends = np.cumsum([part.shape[1] for part in parts_of_floats])[:-1]
        step = max(_FEWEST_ROWS, _TILE_BYTES // (8 * layout.words))
        for start in range(0, size, step):
            tile = slice(start, start + step)
            records = file.records(at[tile])
            if (layout.checksums(salt, numbers_of[tile], records) != records[:, -1]).any():
                raise Damaged("a row has another checksum")
            turned[self._rows_of, tile] = layout.integers(records).T
            for part, found in zip(parts_of_floats, np.split(layout.floats(records), ends, axis=1), strict=True):
                part[tile] = found
            for reader in blocks:
                reader.take(tile, records)
        for (first, other), (one, its) in zip(self._pairs, self._together, strict=True):
            check_equally_long(first, other, turned[one], turned[its], numbers_of)
        parts = [list(values.split(reader.join(values.numpy()))) for reader, values in zip(blocks, jagged, strict=True)]
        by_name = self._by_name(integers, parts)
        numeric, labels, *weights = floats
        return Batch(
            numeric,
            {name: by_name[name] for name in self._names},
            labels if predicted > 1 else labels.squeeze(1),
            of_rows,
            valid,
            buffer,
            weights[0].squeeze(1) if weights else None,
            not layout.schema.complete,
        )

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
