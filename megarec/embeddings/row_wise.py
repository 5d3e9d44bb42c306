"""Tables split by rows: ids to the owners of their rows, and the sum of what the owners found.

The sender sorts the ids of a feature into the row ranges; what an owner receives is a list of any length per example,
also of a feature with exactly one id. Every owner sums the rows it has, and the sums of all owners are added up on
the way back.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megarec.data.batch import Ids
from megarec.embeddings.routes import Slot
from megarec.parallel.collectives import Channel, Messages, all_gather_rows, all_to_all, reduce_scatter_rows


class RowSplitter:
    """Cuts the ids of features whose tables are split by rows into one part an owner.

    Args:
        slots: slots[r] are those of rank r.
    """

    def __init__(self, slots: Sequence[Sequence[Slot]], device: torch.device) -> None:
        by_feature: dict[str, list[Slot]] = {}
        for of_rank in slots:
            for slot in of_rank:
                if slot.by_rows:
                    by_feature.setdefault(slot.feature.name, []).append(slot)
        self._names = {feature: [slot.source.name for slot in own] for feature, own in by_feature.items()}
        starts = {feature: [slot.shard.row_start for slot in own] for feature, own in by_feature.items()}
        self._starts = {name: torch.tensor(rows, device=device) for name, rows in starts.items()}

    def __call__(self, ids: Mapping[str, Ids], size: int) -> Mapping[str, Ids]:
        """`ids` of `size` examples by feature, and beside them the parts under the names of their slots."""
        if not self._names:
            return ids
        parts = {name: _by_owner(ids[name], starts, size) for name, starts in self._starts.items()}
        counts = torch.stack([lengths.sum(dim=1) for _, lengths, _ in parts.values()]).tolist()  # waits for the device
        split = dict(ids)
        for (feature, (values, lengths, weights)), sizes in zip(parts.items(), counts, strict=True):
            of_owner = values.split(sizes)
            weighted = [None] * len(sizes) if weights is None else weights.split(sizes)
            for owner, name in enumerate(self._names[feature]):
                split[name] = Ids(of_owner[owner], lengths[owner], weighted[owner])
        return split


def _by_owner(ids: Ids, starts: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sort ids by owner, in the order of examples within one.

    Args:
        starts: int64 [owners], first row of every owner.

    Returns:
        Rows counted from the owner's first, lengths int64 [owners, size], and the weights in the same order.
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
    return values, lengths.view(-1, size), weights


def sum_over_owners(partial: Tensor, channel: Channel, messages: Messages) -> Tensor:
    """Add up the owners' sums float32 [size x B, columns]; this rank receives those of its B examples, [B, columns].

    In float32 this is a reduce-scatter. Messages of fewer bits are sent by an all-to-all and added in float32, in the
    order of ranks, so that each sum is rounded but once a summand; a reduce-scatter would round every partial result.
    Both send the same bytes. The gradient is the all-gather of the examples' gradients: no sum, hence any type.
    """
    summed: Tensor = _SumOverOwners.apply(partial.contiguous(), channel, messages)
    return summed


class _SumOverOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, channel: Channel, messages: Messages) -> Tensor:
        ctx.channel, ctx.dtype = channel, messages.backward
        if messages.forward == torch.float32:
            own, work = reduce_scatter_rows(partial, channel, "embeddings")
            if work is not None:
                work.wait()
            return own
        message, ranks = partial.to(messages.forward).view(-1), channel.size
        sizes = [message.numel() // ranks] * ranks
        received = all_to_all(message, sizes, sizes, channel, "embeddings")
        return received.view(ranks, -1, partial.shape[1]).sum(dim=0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        gathered, work = all_gather_rows(grads[0].contiguous().to(ctx.dtype), ctx.channel, "embeddings", "backward")
        if work is not None:
            work.wait()
        return gathered.to(torch.float32), None, None
