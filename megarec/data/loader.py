"""Batches of one rank: the same global batches on any topology, each cut into equal slices in rank order."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from megarec.data.batch import Batch
from megarec.data.prefetch import prefetched
from megarec.data.schema import Schema
from megarec.data.shuffle import Int64, example_keys, permuted
from megarec.data.store import Store
from megarec.errors import UserError


@dataclass(frozen=True, kw_only=True)
class _Loader:
    """What training and evaluation share: this rank's slice of a global batch, and its examples.

    Attributes:
        store: the rows of a split.
        schema: the features of its batches.
        batch_size: examples of a global batch, over all ranks; `share` of them are this rank's.
        prefetch: batches prepared ahead in a background thread.
        pin_memory: hand out page-locked batches (needs CUDA).

    Raises:
        UserError: the ranks do not divide the batch size.
    """

    store: Store = field(kw_only=False)
    schema: Schema = field(kw_only=False)
    batch_size: int
    rank: int
    world_size: int
    seed: int
    prefetch: int
    pin_memory: bool

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        share, rest = divmod(self.batch_size, self.world_size)
        if rest or share == 0:
            raise UserError(
                f"data.batch_size={self.batch_size} does not divide by {self.world_size} ranks: {self.batch_size} = "
                f"{self.world_size} x {share} + {rest}; try data.batch_size={max(1, share) * self.world_size}"
            )

    @property
    def share(self) -> int:
        return self.batch_size // self.world_size

    def _positions(self, index: int) -> Int64:
        """Int64 [share]: this rank's slice of the positions of global batch `index`."""
        start = index * self.batch_size + self.rank * self.share
        return np.arange(start, start + self.share, dtype=np.int64)

    def _batch(self, rows: Int64, epoch: int, valid: int) -> Batch:
        numeric, ids, labels = self.store.gather(rows)
        keys = torch.from_numpy(example_keys(rows, self.seed, epoch))
        batch = Batch(numeric, ids, labels, keys, valid)
        return batch.pin_memory() if self.pin_memory else batch


class TrainLoader(_Loader):
    """Every epoch a seeded permutation of all rows; global batch i is its i-th `batch_size` rows.

    The rows left over at an epoch's end, fewer than a batch, are dropped; another permutation drops others.

    Raises:
        UserError: there are fewer rows than one batch, or the ranks do not divide the batch size.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps_per_epoch == 0:
            raise UserError(
                f"data.batch_size={self.batch_size} exceeds the {len(self.store)} training examples; "
                f"set data.batch_size to at most {len(self.store)}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.store) // self.batch_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from global batch `start` on: resuming is starting there."""

        def rank_batches() -> Iterator[Batch]:
            for index in range(start, self.steps_per_epoch):
                rows = permuted(self._positions(index), len(self.store), self.seed, epoch)
                yield self._batch(rows, epoch, self.share)

        return prefetched(rank_batches(), self.prefetch)


class EvalLoader(_Loader):
    """All rows in order, each once over all ranks; every rank gets the same number of equal batches."""

    @property
    def steps(self) -> int:
        return -(-len(self.store) // self.batch_size)

    def batches(self) -> Iterator[Batch]:
        """This rank's batches; beyond `Batch.valid`, which may be 0, the last one repeats the split's last row."""

        def rank_batches() -> Iterator[Batch]:
            last = len(self.store) - 1
            for index in range(self.steps):
                positions = self._positions(index)
                valid = int((positions <= last).sum())
                yield self._batch(np.minimum(positions, last), 0, valid)

        return prefetched(rank_batches(), self.prefetch)
