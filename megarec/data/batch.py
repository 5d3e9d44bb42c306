"""One batch of examples on one rank; lists of different lengths are jagged, stored one after another."""

from collections.abc import Callable
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
    """

    numeric: Tensor
    ids: dict[str, Ids]
    labels: Tensor
    keys: Tensor
    valid: int

    @property
    def size(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; copies from pinned memory do not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which copies to a GPU do not wait; needs CUDA."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        ids = {name: Ids(change(f.values), changed(f.lengths), changed(f.weights)) for name, f in self.ids.items()}
        return Batch(change(self.numeric), ids, change(self.labels), change(self.keys), self.valid)


def flat_positions(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ranges starts[i] .. starts[i] + lengths[i], one after another: int64 [sum(lengths)]."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum(), dtype=np.int64)
