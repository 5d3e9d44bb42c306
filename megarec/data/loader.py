"""Batches of one rank: the same global batches on any topology, each cut into equal slices in rank order.

The order and the keys of examples are pure functions of (seed, epoch, row), the same on every machine and topology.
They do not depend on a generator's state, so a run resumes at any position at once, and a permutation of billions of
rows takes no memory. A background thread prepares a bounded number of batches ahead.
"""

import math
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from megarec.data.batch import Batch
from megarec.data.records import mix64
from megarec.data.schema import Schema
from megarec.data.store import Store
from megarec.errors import UserError

Int64 = NDArray[np.int64]
_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def numbers_from(seed: int, epoch: int, purpose: int) -> NDArray[np.uint64]:
    """uint64 [1]: the start of an independent stream of numbers."""
    state = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        state = mix64((state ^ np.array([part % 2**64], np.uint64)) + _GOLDEN)
    return state


def example_keys(rows: Int64, seed: int, epoch: int) -> Int64:
    """Int64 [B]: a number per row number and epoch; distinct rows have distinct keys."""
    return mix64(rows.view(np.uint64) * _GOLDEN + numbers_from(seed, epoch, 1)).view(np.int64)


def permuted(positions: Int64, n: int, seed: int, epoch: int) -> Int64:
    """Rows at these positions of the epoch's permutation of n rows.

    A Feistel network over pairs (l, r) of numbers below a = ceil(sqrt(n)) permutes the a^2 >= n pairs; a result
    of n or more walks on through the network until it is a row (cycle walking: Black and Rogaway 2002, sec. 3).

    Args:
        positions: int64 [B] in [0, n).
    """
    side = np.uint64(math.isqrt(n - 1) + 1)
    keys = mix64(numbers_from(seed, epoch, 2) + _GOLDEN * np.arange(_ROUNDS, dtype=np.uint64))
    rows = positions.astype(np.uint64)
    walking = np.ones(len(rows), bool)
    while walking.any():
        left, right = np.divmod(rows[walking], side)
        for key in keys:
            left, right = right, (left + mix64(right + key) % side) % side
        rows[walking] = left * side + right
        walking = rows >= n
    return rows.view(np.int64)


T = TypeVar("T")


class _End:
    """Marks the end of the items, and the error that ended them, if one did."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Producer(Generic[T]):
    """Makes items in a thread until they end or `stop` is called; at most `ahead` are made or in progress."""

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self._queue: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(ahead)
        self._items = items
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        error = None
        try:
            while self._room.acquire() and not self._stopped:
                self._queue.put(next(self._items))
        except StopIteration:
            pass
        except BaseException as caught:
            error = caught
        if isinstance(self._items, Generator):
            self._items.close()  # here, with the threads that it has itself
        self._queue.put(_End(error))

    def take(self) -> T | _End:
        """The next item, now the caller's: another one may be made."""
        item = self._queue.get()
        self._room.release()
        return item

    def stop(self) -> None:
        """End the thread, after the item in progress."""
        self._stopped = True
        self._room.release()
        self._thread.join()


def prefetched(items: Iterator[T], ahead: int) -> Iterator[T]:
    """The same items, prepared up to `ahead` before they are asked for.

    An error in the thread is raised here, where the item is awaited. Closing the iterator ends the thread.
    """
    producer = _Producer(items, ahead)
    try:
        while not isinstance(item := producer.take(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        producer.stop()


class Source(Protocol):
    """The rows of a split: a `Store`, or a `Stream`.

    Attributes:
        skipped: rows left out under data.bad_rows="skip", by reason.
        labels: those that occur, in order.
    """

    skipped: dict[str, int]
    labels: list[float]

    def __len__(self) -> int: ...

    def arrange(self, names: Sequence[str], together: Sequence[Sequence[str]] = ()) -> None:
        """Let the ids of batches lie in this order of features; lists of `together` must be equally long."""


@dataclass(frozen=True, kw_only=True)
class _Loader:
    """What training and evaluation share: this rank's slice of a global batch, and its examples.

    Attributes:
        store: the rows of a split.
        batch_size: examples of a global batch, over all ranks; `share` of them are this rank's.
        prefetch: batches prepared ahead in a background thread.
        pin_memory: hand out batches in page-locked memory (needs CUDA).

    Raises:
        UserError: the ranks do not divide the batch size.
    """

    store: Source = field(kw_only=False)
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


class EpochLoader(_Loader, ABC):
    """Training batches: epoch after epoch, the same ones on any topology.

    The rows left over at an epoch's end, fewer than a batch, are dropped; another epoch drops others.

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

    @abstractmethod
    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from global batch `start` on: resuming is starting there."""


class TrainLoader(EpochLoader):
    """Every epoch a seeded permutation of all rows; global batch i is its i-th `batch_size` rows."""

    store: Store

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from global batch `start` on: resuming is starting there."""
        indices = range(start, self.steps_per_epoch)
        return prefetched((self.batch(epoch, index) for index in indices), self.prefetch)

    def batch(self, epoch: int, index: int) -> Batch:
        """This rank's part of global batch `index` of an epoch."""
        rows = self.rows(epoch, index)
        return self.store.read(rows, example_keys(rows, self.seed, epoch), self.share, self.pin_memory)

    def rows(self, epoch: int, index: int) -> Int64:
        """Int64 [share]: which rows those are."""
        return permuted(self._positions(index), len(self.store), self.seed, epoch)


@dataclass(frozen=True, kw_only=True)
class EvalLoader(_Loader):
    """All rows in order, each once over all ranks; every rank gets the same number of equal batches.

    Attributes:
        groups: whole numbers [len(store)], what group each row belongs to, -1: none; on rank 0 alone. None: the data
            name no group, or this is another rank.
    """

    store: Store = field(kw_only=False)
    groups: NDArray[np.int32] | None = None

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
                rows = np.minimum(positions, last)
                yield self.store.read(rows, example_keys(rows, self.seed, 0), valid, self.pin_memory)

        return prefetched(rank_batches(), self.prefetch)
