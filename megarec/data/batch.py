"""One batch of examples on one rank; lists of different lengths are jagged, stored one after another."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Ids:
    """The ids of one categorical feature for B examples: jagged, as values + lengths.

    Attributes:
        values: int64 [sum(lengths)], example after example.
        lengths: int64 [B]; None when every example has exactly one id, so that values is [B].
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
        labels: float32 [B], 0 or 1.
        keys: int64 [B], a number per example and epoch that is the same on every topology: dropout hashes it.
        valid: how many leading examples count; fewer than B only in the last evaluation batches, whose rest is
            padding so that every rank runs the same number of equal batches.
        buffer: bytes that all the tensors are views of (`in_one_buffer`); None: each has its own memory.
    """

    numeric: Tensor
    ids: dict[str, Ids]
    labels: Tensor
    keys: Tensor
    valid: int
    buffer: Tensor | None = None

    @property
    def size(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, by one copy where it lies in one buffer; copies from pinned memory do not wait."""
        if self.buffer is None:
            return self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return self._over(self.buffer.to(device, non_blocking=True))

    def in_one_buffer(self, pinned: bool) -> "Batch":
        """A copy whose tensors lie in one buffer: a batch of hundreds of features is one copy to an accelerator.

        Args:
            pinned: in page-locked memory, from which copies to a GPU do not wait; needs CUDA.
        """
        tensors = list(self._tensors())
        buffer = torch.empty(sum(tensor.nbytes for tensor in tensors), dtype=torch.uint8, pin_memory=pinned)
        packed = self._over(buffer)
        for view, tensor in zip(packed._tensors(), tensors, strict=True):
            view.copy_(tensor)
        return packed

    def _tensors(self) -> Iterator[Tensor]:
        yield from (self.numeric, self.labels, self.keys)
        for ids in self.ids.values():
            yield from (tensor for tensor in (ids.values, ids.lengths, ids.weights) if tensor is not None)

    def _over(self, buffer: Tensor) -> "Batch":
        """The same shapes and types as views of a buffer, wide types first, so that each is aligned."""
        views: dict[int, Tensor] = {}
        offset = 0
        tensors = list(self._tensors())
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=lambda dtype: (-dtype.itemsize, str(dtype))):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            sizes = [tensor.numel() for tensor in alike]
            end = offset + sum(sizes) * dtype.itemsize
            for tensor, view in zip(alike, buffer[offset:end].view(dtype).split(sizes), strict=True):
                views[id(tensor)] = view.view(tensor.shape) if tensor.dim() > 1 else view
            offset = end
        return dataclasses.replace(self._map(lambda tensor: views[id(tensor)]), buffer=buffer)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        ids = {name: Ids(change(f.values), changed(f.lengths), changed(f.weights)) for name, f in self.ids.items()}
        return Batch(change(self.numeric), ids, change(self.labels), change(self.keys), self.valid)


def flat_positions(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ranges starts[i] .. starts[i] + lengths[i], one after another: int64 [sum(lengths)]."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum(), dtype=np.int64)
