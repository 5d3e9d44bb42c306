"""One batch of examples on one rank; lists of different lengths are jagged, stored one after another."""

import dataclasses
import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Ids:
    """The ids of one categorical feature for B examples: jagged, as values + lengths.

    Attributes:
        values: int32 or int64 [sum(lengths)], example after example.
        lengths: int32 or int64 [B]; None when every example has exactly one id, so that values is [B].
        weights: float32 [sum(lengths)], by which the rows of the values are multiplied; None: not weighted.
    """

    values: Tensor
    lengths: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """B examples of one rank.

    Attributes:
        numeric: float32 [B, number of numeric features].
        ids: per categorical feature, by name.
        labels: float32 [B], 0 or 1, or NaN where one is missing; [B, T] of several labels.
        keys: int64 [B], a number per example and epoch that is the same on every topology: dropout hashes it.
        valid: how many leading examples count; fewer than B only in the last evaluation batches, whose rest is
            padding so that every rank runs the same number of equal batches.
        buffer: uint8, at the start of its memory: all the tensors are views of it; None: each has its own memory.
        weights: float32 [B], by which the examples' losses are multiplied; None: not weighted.
        some_missing: whether a label may be missing.
    """

    numeric: Tensor
    ids: dict[str, Ids]
    labels: Tensor
    keys: Tensor
    valid: int
    buffer: Tensor | None = None
    weights: Tensor | None = None
    some_missing: bool = False

    @property
    def size(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, by one copy where it lies in one buffer; copies from pinned memory do not wait."""
        if self.buffer is None:
            return self._map(lambda tensor: tensor.to(device, non_blocking=True))
        if self.buffer.device == device:
            return self
        buffer = self.buffer.to(device, non_blocking=True)
        typed = {dtype: buffer.view(dtype) for dtype in {tensor.dtype for tensor in self._tensors()}}
        moved = self._map(lambda t: typed[t.dtype].as_strided(t.shape, t.stride(), t.storage_offset()))
        return dataclasses.replace(moved, buffer=buffer)

    def in_one_buffer(self, pinned: bool) -> "Batch":
        """A copy whose tensors lie in one buffer, as the loaders make them: one copy to an accelerator.

        Args:
            pinned: in page-locked memory, from which copies to a GPU do not wait; needs CUDA.
        """
        tensors = list(self._tensors())
        buffer, views = carve([(tensor.shape, tensor.dtype) for tensor in tensors], pinned)
        place = {id(tensor): view.copy_(tensor) for tensor, view in zip(tensors, views, strict=True)}
        return dataclasses.replace(self._map(lambda tensor: place[id(tensor)]), buffer=buffer)

    def _tensors(self) -> Iterator[Tensor]:
        yield from (self.numeric, self.labels, self.keys)
        if self.weights is not None:
            yield self.weights
        for ids in self.ids.values():
            yield from (tensor for tensor in (ids.values, ids.lengths, ids.weights) if tensor is not None)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        ids = {name: Ids(change(f.values), changed(f.lengths), changed(f.weights)) for name, f in self.ids.items()}
        return Batch(
            change(self.numeric),
            ids,
            change(self.labels),
            change(self.keys),
            self.valid,
            weights=changed(self.weights),
            some_missing=self.some_missing,
        )


_LARGE = 4 << 20


class _Spare:
    """Memory of large batches no longer in use: filling fresh pages takes longer than reading a batch."""

    _KEPT = 2  # not in use

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: list[NDArray[np.uint8]] = []

    def memory(self, size: int) -> NDArray[np.uint8]:
        """At least that many bytes; the caller's as long as anything refers to them."""
        with self._lock:
            free = [number for number in range(len(self._all)) if _references(self._all, number) == _UNUSED]
            free.sort(key=lambda number: self._all[number].nbytes, reverse=True)
            for number in sorted(free[self._KEPT :], reverse=True):
                del self._all[number]  # as many as an evaluation held at once may be free now
            for number in range(len(self._all)):
                if self._all[number].nbytes >= size and _references(self._all, number) == _UNUSED:
                    return self._all[number]
            found = np.empty(size + size // 8, np.uint8)  # lists make the next one somewhat larger
            self._all.append(found)
            return found


def _references(arrays: list[NDArray[np.uint8]], number: int) -> int:
    return sys.getrefcount(arrays[number])


_UNUSED = _references([np.empty(0, np.uint8)], 0)  # of an array that a list has and nothing else
_spare = _Spare()


def carve(parts: Sequence[tuple[Sequence[int], torch.dtype]], pinned: bool) -> tuple[Tensor, list[Tensor]]:
    """One buffer, and tensors of these shapes and types in it, one after another, each at a multiple of 8 bytes.

    Args:
        pinned: in page-locked memory; needs CUDA.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in parts]
    starts = list(itertools.accumulate((-(-size // 8) * 8 for size in sizes), initial=0))
    if pinned or starts[-1] < _LARGE:
        buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
    else:
        buffer = torch.from_numpy(_spare.memory(starts[-1]))[: starts[-1]]
    views = [
        buffer[start : start + size].view(dtype).view(*shape)
        for (shape, dtype), start, size in zip(parts, starts, sizes, strict=False)
    ]
    return buffer, views


def end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """Contiguous vectors one after another; no copy where memory already has them so."""
    first, end = parts[0], parts[0].storage_offset()
    memory = first.untyped_storage()._cdata  # which storage it is; one without memory of its own has no address
    for part in parts:
        if (
            part.storage_offset() != end
            or part.dtype != first.dtype
            or part.untyped_storage()._cdata != memory
            or not part.is_contiguous()
        ):
            return torch.cat(list(parts))
        end += part.numel()
    start = first.storage_offset()
    return first.as_strided((end - start,), (1,), start)


def flat_positions(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ranges starts[i] .. starts[i] + lengths[i], one after another: int64 [sum(lengths)]."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum(), dtype=np.int64)
