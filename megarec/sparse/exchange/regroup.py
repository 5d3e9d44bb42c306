"""The local shuffle: blocks of embeddings from every sender -> one matrix in layout order, and back.

Tables split by rows add a sum of what the owners found (`sum_over_owners`). The sender sorts the ids of a feature into
the row ranges; what an owner receives is a list of any length per example, also of a feature with exactly one id.
Every owner sums the rows it has, and the sums of all owners are added up on the way back.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megarec.data.batch import Ids
from megarec.distributed.collectives import Channel, WireDtypes, all_gather_rows, all_to_all, reduce_scatter_rows


def sum_over_owners(partial: Tensor, channel: Channel, messages: WireDtypes) -> Tensor:
    """Add up the owners' sums float32 [size x B, columns]; this rank receives those of its B examples, [B, columns].

    In float32 this is a reduce-scatter. Messages of fewer bits are sent by an all-to-all and added in float32, in the
    order of ranks, so that each sum is rounded but once a summand; a reduce-scatter would round every partial result.
    Both send the same bytes. The gradient is the all-gather of the examples' gradients: no sum, hence any type.
    """
    summed: Tensor = _SumOverOwners.apply(partial.contiguous(), channel, messages)
    return summed


class _SumOverOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, channel: Channel, messages: WireDtypes) -> Tensor:
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


Divisors = dict[str, Tensor]
"""By feature with mean pooling: the length of every bag as float32 [B, 1], at least 1."""


@dataclass(frozen=True)
class ColumnBlock:
    """Columns of one feature in a sender's block.

    Attributes:
        feature: its name.
        start: first column in the assembled matrix.
        offset: first column in the sender's block.
        columns: how many.
    """

    feature: str
    start: int
    offset: int
    columns: int


class Regroup:
    """Puts columns where the layout wants them, and turns the owners' sums into means where a feature asks for it.

    Means are made here, where the lengths are known, so that owners and their backends only ever sum.

    Args:
        pieces: pieces[r] are those of sender r, in the order of its columns.
        mean: features whose sums become means.
    """

    def __init__(self, pieces: Sequence[Sequence[ColumnBlock]], mean: Collection[str] = ()) -> None:
        self.pieces = pieces
        self.in_layout_order: list[tuple[int, ColumnBlock]] = sorted(
            ((sender, piece) for sender, own in enumerate(pieces) for piece in own), key=lambda pair: pair[1].start
        )
        self._mean = mean
        offsets = [piece.offset for _, piece in self.in_layout_order]
        self._in_place = len(pieces) == 1 and not mean and offsets == sorted(offsets)
        self._columns = [sum(piece.columns for piece in own) for own in pieces]

    def __call__(self, blocks: Tensor, ids: Mapping[str, Ids], size: int) -> Tensor:
        """[sum over senders of B x columns(sender)] -> [B, columns of all]; ids: those of the B examples, for means."""
        if self._in_place:
            return blocks.view(size, self._columns[0])
        divisors: Divisors = {}
        for name in self._mean:
            lengths = ids[name].lengths
            assert lengths is not None
            divisors[name] = lengths.clamp(min=1).to(torch.float32).unsqueeze(1)
        assembled: Tensor = _Regroup.apply(blocks, self, size, divisors)
        return assembled

    def split(self, blocks: Tensor, size: int) -> list[Tensor]:
        """Views [B, columns(sender)] of the senders' blocks."""
        parts = blocks.split([size * width for width in self._columns])
        return [part.view(size, width) for part, width in zip(parts, self._columns, strict=True)]


class _Regroup(torch.autograd.Function):
    """One copy each way."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, assembly: Regroup, size: int, divisors: Divisors) -> Tensor:
        ctx.assembly, ctx.divisors = assembly, divisors
        senders = assembly.split(blocks, size)
        out = torch.cat(
            [senders[s][:, piece.offset : piece.offset + piece.columns] for s, piece in assembly.in_layout_order], dim=1
        )
        for _, piece in assembly.in_layout_order:
            if piece.feature in divisors:
                out[:, piece.start : piece.start + piece.columns].div_(divisors[piece.feature])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad, pieces, divisors = grads[0], ctx.assembly.pieces, ctx.divisors

        def columns(piece: ColumnBlock) -> Tensor:
            part = grad[:, piece.start : piece.start + piece.columns]
            return part / divisors[piece.feature] if piece.feature in divisors else part

        size = grad.shape[0]
        blocks = grad.new_empty(size * sum(piece.columns for own in pieces for piece in own))
        for block, own in zip(ctx.assembly.split(blocks, size), pieces, strict=True):
            if own:
                torch.cat([columns(piece) for piece in own], dim=1, out=block)
        return blocks, None, None, None
