"""Ids out: every rank sends the ids of its examples to the ranks whose slots look them up.

Single-valued features alone need one message (the receiver knows its size). With jagged features their lengths go
first; the values of all features follow with uneven splits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarec.data.batch import Batch
from megarec.embeddings.routes import Routes
from megarec.parallel.collectives import Channel, all_to_all


@dataclass(frozen=True)
class LocalIds:
    """What this rank looks up: its slots, each over the E = world_size x B examples of the global batch, in order.

    Attributes:
        values: int [sum(counts)], slot after slot, example after example.
        offsets: int [slots x E + 1]: bag (slot s, example e) is values[offsets[s E + e] : offsets[s E + e + 1]].
        counts: values per slot.
        examples: E.
    """

    values: Tensor
    offsets: Tensor
    counts: tuple[int, ...]
    examples: int

    def part(self, start: int, stop: int) -> "LocalIds":
        """The ids of the slots start .. stop."""
        if (start, stop) == (0, len(self.counts)):
            return self
        first = sum(self.counts[:start])
        counts = self.counts[start:stop]
        offsets = self.offsets[start * self.examples : stop * self.examples + 1]
        return LocalIds(self.values[first : first + sum(counts)], offsets - first, counts, self.examples)


class IdExchange:
    """Sends ids to the owners of the tables; every rank must hand in a batch of the same size."""

    def __init__(self, routes: Routes, channel: Channel, device: torch.device) -> None:
        self._channel = channel
        self._device = device
        self._dtype = routes.index_dtype
        self._features = [[slot.feature.name for slot in slots] for slots in routes.slots]
        self._jagged = [[slot.feature.name for slot in slots if slot.feature.multi_valued] for slots in routes.slots]
        mine = [s for s, slot in enumerate(routes.slots[channel.rank]) if slot.feature.multi_valued]
        self._jagged_slots = torch.tensor(mine, dtype=torch.int64, device=device)
        self._offsets = torch.zeros(1, dtype=self._dtype, device=device)  # of bags with one id each

    def __call__(self, batch: Batch) -> LocalIds:
        return self._exchange_jagged(batch) if any(self._jagged) else self._exchange_single(batch)

    def _exchange_single(self, batch: Batch) -> LocalIds:
        size, ranks = batch.size, self._channel.size
        slots = len(self._features[self._channel.rank])
        received = self._send_values(batch, [slots * size] * ranks)
        values = received.view(ranks, slots, size).transpose(0, 1).reshape(-1)
        if self._offsets.numel() != values.numel() + 1:
            self._offsets = torch.arange(values.numel() + 1, dtype=self._dtype, device=self._device)
        return LocalIds(values, self._offsets, (ranks * size,) * slots, ranks * size)

    def _exchange_jagged(self, batch: Batch) -> LocalIds:
        size, ranks = batch.size, self._channel.size
        slots, jagged = len(self._features[self._channel.rank]), self._jagged_slots.numel()
        lengths = torch.ones(slots, ranks, size, dtype=self._dtype, device=self._device)
        lengths.index_copy_(0, self._jagged_slots, self._send_lengths(batch).view(ranks, jagged, size).transpose(0, 1))
        sizes: list[list[int]] = lengths.sum(dim=2).T.tolist()  # [ranks][slots]: the one wait for the device
        received = self._send_values(batch, [sum(row) for row in sizes])
        segments = received.split([size for row in sizes for size in row])
        values = torch.cat([segments[r * slots + s] for s in range(slots) for r in range(ranks)])
        offsets = torch.zeros(lengths.numel() + 1, dtype=self._dtype, device=self._device)
        torch.cumsum(lengths.view(-1), 0, dtype=self._dtype, out=offsets[1:])
        counts = tuple(sum(row[s] for row in sizes) for s in range(slots))
        return LocalIds(values, offsets, counts, ranks * size)

    def _send_lengths(self, batch: Batch) -> Tensor:
        parts = [_lengths(batch, name) for names in self._jagged for name in names]
        mine = self._jagged_slots.numel()
        return all_to_all(
            torch.cat(parts).to(self._dtype),
            [mine * batch.size] * self._channel.size,
            [len(names) * batch.size for names in self._jagged],
            self._channel,
            "lengths",
        )

    def _send_values(self, batch: Batch, output_sizes: Sequence[int]) -> Tensor:
        by_rank = [[batch.ids[name].values for name in names] for names in self._features]
        sizes = [sum(values.shape[0] for values in parts) for parts in by_rank]
        flat = torch.cat([values for parts in by_rank for values in parts]).to(self._dtype)
        return all_to_all(flat, output_sizes, sizes, self._channel, "ids")


def _lengths(batch: Batch, feature: str) -> Tensor:
    lengths = batch.ids[feature].lengths
    assert lengths is not None, f"{feature} is multi-valued, but its batch has no lengths"
    return lengths
