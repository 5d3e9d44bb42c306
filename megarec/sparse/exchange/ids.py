"""Ids out: every rank sends the ids of its examples to the ranks whose slots look them up.

Single-valued features alone need one message (the receiver knows its size). With jagged features their lengths go
first; the values of all features follow with uneven splits, and the weights of weighted ones after them.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megarec.data.batch import Ids, end_to_end
from megarec.distributed.collectives import Channel, all_to_all
from megarec.sparse.layout import Feature
from megarec.sparse.lookups import Lookup
from megarec.sparse.tables.base import LocalIds


class IdExchange:
    """Sends ids to the ranks of a channel that ask for them; every rank must hand in batches of the same size.

    Args:
        features: features[r] are those that rank r of the channel receives, slot after slot.
        dtype: of ids and lengths on the wire.
        blocks: of how many equal blocks a batch consists; the examples received are ordered by block, then by rank.
    """

    def __init__(
        self,
        features: Sequence[Sequence[Feature]],
        channel: Channel,
        dtype: torch.dtype,
        device: torch.device,
        blocks: int = 1,
    ) -> None:
        self._channel = channel.for_ids
        self._device = device
        self._dtype = dtype
        self._blocks = blocks
        self._features = [[feature.name for feature in of_rank] for of_rank in features]
        self._jagged = [[feature.name for feature in of_rank if feature.multi_valued] for of_rank in features]
        self._weighted = [[feature.name for feature in of_rank if feature.weighted] for of_rank in features]
        self._weighted_slots = [slot for slot, feature in enumerate(features[channel.rank]) if feature.weighted]
        mine = [slot for slot, feature in enumerate(features[channel.rank]) if feature.multi_valued]
        self._jagged_slots = torch.tensor(mine, dtype=torch.int64, device=device)
        self._offsets = torch.zeros(1, dtype=dtype, device=device)  # of bags with one id each

    @property
    def order(self) -> list[str]:
        """Features in the order in which their ids are sent; a batch in which they lie so is sent without a copy."""
        return [name for names in self._features for name in names]

    def __call__(self, ids: Mapping[str, Ids], size: int) -> LocalIds:
        """The ids of `size` examples by feature -> those of this rank's slots over all ranks' examples."""
        return self._exchange_jagged(ids, size) if any(self._jagged) else self._exchange_single(ids, size)

    def _exchange_single(self, ids: Mapping[str, Ids], size: int) -> LocalIds:
        ranks, slots = self._channel.size, len(self._features[self._channel.rank])
        received = self._send_values(ids, [slots * size] * ranks)
        values = self._in_order(received, slots, size).reshape(-1)
        if self._offsets.numel() != values.numel() + 1:
            self._offsets = torch.arange(values.numel() + 1, dtype=self._dtype, device=self._device)
        return LocalIds(values, self._offsets, (ranks * size,) * slots, ranks * size)

    def _exchange_jagged(self, ids: Mapping[str, Ids], size: int) -> LocalIds:
        ranks, slots = self._channel.size, len(self._features[self._channel.rank])
        jagged = self._in_order(self._send_lengths(ids, size), self._jagged_slots.numel(), size)
        lengths = torch.ones(slots, *jagged.shape[1:], dtype=self._dtype, device=self._device)
        lengths.index_copy_(0, self._jagged_slots, jagged)
        sums: list[list[list[int]]] = lengths.sum(dim=3).tolist()  # [slots][blocks][ranks]: the one wait for the device
        received = self._send_values(
            ids, [sum(sums[s][b][r] for s, b in self._segments(range(slots))) for r in range(ranks)]
        )
        values = self._slot_after_slot(received, sums, range(slots))
        offsets = torch.zeros(lengths.numel() + 1, dtype=self._dtype, device=self._device)
        torch.cumsum(lengths.view(-1), 0, dtype=self._dtype, out=offsets[1:])
        counts = tuple(sum(map(sum, of_slot)) for of_slot in sums)
        weights = self._exchange_weights(ids, sums, counts) if any(self._weighted) else None
        return LocalIds(values, offsets, counts, ranks * size, weights, sums)

    def _exchange_weights(self, ids: Mapping[str, Ids], sums: list[list[list[int]]], counts: Sequence[int]) -> Tensor:
        """Those of weighted slots from all ranks, ones for the others: float32, in the order of the values."""
        parts = [[_weights(ids, name) for name in names] for names in self._weighted]
        sizes = [sum(part.shape[0] for part in own) for own in parts]
        flat = end_to_end([part for own in parts for part in own])
        slots = self._weighted_slots
        expected = [sum(sums[s][b][r] for s, b in self._segments(slots)) for r in range(self._channel.size)]
        received = all_to_all(flat, expected, sizes, self._channel, "weights")
        in_order = self._slot_after_slot(received, sums, slots)
        of_slot = dict(zip(slots, in_order.split([counts[slot] for slot in slots]), strict=True))
        ones = torch.ones(max(counts, default=0), device=self._device)
        return torch.cat([of_slot.get(slot, ones[:count]) for slot, count in enumerate(counts)] or [received])

    def _segments(self, slots: Iterable[int]) -> list[tuple[int, int]]:
        """(slot, block) in the order in which a rank sends them."""
        return [(slot, block) for slot in slots for block in range(self._blocks)]

    def _slot_after_slot(self, received: Tensor, sums: list[list[list[int]]], slots: Sequence[int]) -> Tensor:
        """One number a value, by rank, then slot, then block -> by slot, then block, then rank.

        Args:
            sums: sums[slot][block][rank], how many each has.
        """
        ranks, sent = range(self._channel.size), self._segments(slots)
        segments = received.split([sums[s][b][r] for r in ranks for s, b in sent])
        order = [r * len(sent) + index for index in range(len(sent)) for r in ranks]
        return torch.cat([segments[index] for index in order]) if order else received

    def _in_order(self, received: Tensor, slots: int, size: int) -> Tensor:
        """One number an example, by rank -> [slots, blocks, ranks, examples of a block]."""
        by_rank = received.view(self._channel.size, slots, self._blocks, size // self._blocks)
        return by_rank.permute(1, 2, 0, 3)

    def _send_lengths(self, ids: Mapping[str, Ids], size: int) -> Tensor:
        parts = [_lengths(ids, name) for names in self._jagged for name in names]
        mine = self._jagged_slots.numel()
        return all_to_all(
            end_to_end(parts).to(self._dtype),
            [mine * size] * self._channel.size,
            [len(names) * size for names in self._jagged],
            self._channel,
            "lengths",
        )

    def _send_values(self, ids: Mapping[str, Ids], output_sizes: Sequence[int]) -> Tensor:
        by_rank = [[ids[name].values for name in names] for names in self._features]
        sizes = [sum(values.shape[0] for values in parts) for parts in by_rank]
        flat = end_to_end([values for parts in by_rank for values in parts]).to(self._dtype)
        return all_to_all(flat, output_sizes, sizes, self._channel, "ids")


def _lengths(ids: Mapping[str, Ids], feature: str) -> Tensor:
    lengths = ids[feature].lengths
    assert lengths is not None, f"{feature} is multi-valued, but its batch has no lengths"
    return lengths


def _weights(ids: Mapping[str, Ids], feature: str) -> Tensor:
    weights = ids[feature].weights
    assert weights is not None, f"{feature} is weighted, but its batch has no weights"
    return weights


class RowSplitter:
    """Cuts the ids of features whose tables are split by rows into one part an owner.

    Args:
        slots: slots[r] are those of rank r.
    """

    def __init__(self, slots: Sequence[Sequence[Lookup]], device: torch.device) -> None:
        by_feature: dict[str, list[Lookup]] = {}
        for of_rank in slots:
            for slot in of_rank:
                known = by_feature.setdefault(slot.feature.name, [])
                if slot.by_rows and all(slot.source.name != other.source.name for other in known):
                    known.append(slot)
        by_feature = {feature: own for feature, own in by_feature.items() if own}
        self._names = {feature: [slot.source.name for slot in own] for feature, own in by_feature.items()}
        starts = {feature: [slot.shard.row_start for slot in own] for feature, own in by_feature.items()}
        self._starts = {name: torch.tensor(rows, device=device) for name, rows in starts.items()}

    def __call__(self, ids: Mapping[str, Ids], size: int) -> tuple[Mapping[str, Ids], dict[str, Tensor]]:
        """`ids` of `size` examples by feature, and beside them the parts under the names of their slots; and by these
        names, where among the feature's ids each came from."""
        if not self._names:
            return ids, {}
        parts = {name: _by_owner(ids[name], starts, size) for name, starts in self._starts.items()}
        counts = torch.stack([lengths.sum(dim=1) for _, lengths, _, _ in parts.values()]).tolist()  # waits for a device
        split, orders = dict(ids), dict[str, Tensor]()
        for (feature, (values, lengths, weights, order)), sizes in zip(parts.items(), counts, strict=True):
            of_owner = values.split(sizes)
            orders |= zip(self._names[feature], order.split(sizes), strict=True)
            weighted = [None] * len(sizes) if weights is None else weights.split(sizes)
            for owner, name in enumerate(self._names[feature]):
                split[name] = Ids(of_owner[owner], lengths[owner], weighted[owner])
        return split, orders


def _by_owner(ids: Ids, starts: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Sort ids by owner, in the order of examples within one.

    Args:
        starts: int64 [owners], first row of every owner.

    Returns:
        Rows counted from the owner's first, lengths int64 [owners, size], the weights in the same order, and that.
    """
    starts = starts.to(ids.values.dtype)
    owners, order = (torch.bucketize(ids.values, starts, right=True) - 1).sort(stable=True)
    values = ids.values.index_select(0, order) - starts.index_select(0, owners)
    bags = torch.arange(size, device=values.device)
    if ids.lengths is not None:
        bags = bags.repeat_interleave(ids.lengths, output_size=values.numel())
    lengths = torch.zeros(starts.numel() * size, dtype=torch.int64, device=values.device)
    lengths.index_add_(0, owners * size + bags.index_select(0, order), torch.ones_like(owners))
    weights = None if ids.weights is None else ids.weights.index_select(0, order)
    return values, lengths.view(-1, size), weights, order
