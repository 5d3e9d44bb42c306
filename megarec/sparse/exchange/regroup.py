"""The local shuffle: blocks of embeddings from every sender -> one matrix in layout order, and back.

Tables split by rows add a sum of what the owners found (`sum_over_owners`). The sender sorts the ids of a feature into
the row ranges; what an owner receives is a list of any length per example, also of a feature with exactly one id.
Every owner sums the rows it has, and the sums of all owners are added up on the way back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megarec.data.batch import Ids
from megarec.distributed.collectives import Channel, WireDtypes, all_gather_rows, all_to_all, reduce_scatter_rows
from megarec.kernels.launch import triton_problem
from megarec.sparse.exchange.fused_regroup import FusedRegroup


def sum_over_owners(partial: Tensor, channel: Channel, messages: WireDtypes) -> Tensor:
    """Add up the owners' sums [size x B, columns]; this rank receives those of its B examples, float32 [B, columns].

    In float32 this is a reduce-scatter. Messages of fewer bits are sent by an all-to-all and added in float32, in the
    order of ranks, so that each sum is rounded but once a summand; a reduce-scatter would round every partial result.
    Both send the same bytes.
    """
    if messages.forward == torch.float32:
        return reduce_scatter_rows(partial.float().contiguous(), channel, "embeddings").wait()
    message, ranks = partial.to(messages.forward).reshape(-1), channel.size
    sizes = [message.numel() // ranks] * ranks
    received = all_to_all(message, sizes, sizes, channel, "embeddings")
    return received.view(ranks, -1, partial.shape[1]).sum(dim=0, dtype=torch.float32)


def gradient_for_owners(gradient: Tensor, channel: Channel, messages: WireDtypes) -> Tensor:
    """Of `sum_over_owners`, [B, columns] -> [size x B, columns]: no sum, hence any type."""
    message = gradient.to(messages.backward).contiguous()
    return all_gather_rows(message, channel, "embeddings", "backward").wait()


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


class Scattered(NamedTuple):
    """The gradient of the senders' blocks.

    Attributes:
        blocks: [sum over senders of B x columns(sender)].
        total: float32 scalar, finite only if every element of the gradient is; None: it would be a pass of its own.
    """

    blocks: Tensor
    total: Tensor | None


class Regroup:
    """Puts columns where the layout wants them, and turns the owners' sums into means where a feature asks for it.

    Means are made here, where the lengths are known, so that owners and their backends only ever sum.

    Args:
        pieces: pieces[r] are those of sender r, in the order of its columns.
        device: of the embeddings; on an accelerator one kernel does all of it.
        mean: features whose sums become means.
    """

    def __init__(self, pieces: Sequence[Sequence[ColumnBlock]], device: torch.device, mean: Sequence[str] = ()) -> None:
        self.pieces = pieces
        self.in_layout_order: list[tuple[int, ColumnBlock]] = sorted(
            ((sender, piece) for sender, own in enumerate(pieces) for piece in own), key=lambda pair: pair[1].start
        )
        self.mean = mean
        offsets = [piece.offset for _, piece in self.in_layout_order]
        self._in_place = len(pieces) == 1 and not mean and offsets == sorted(offsets)
        self._columns = [sum(piece.columns for piece in own) for own in pieces]
        self._divisor_of = {name: row for row, name in enumerate(mean)}
        self._fused: FusedRegroup | None = None
        if device.type != "cpu" and triton_problem(device.type) is None and any(self._columns):
            numbers = [
                (sender, piece.offset, piece.columns, self._divisor_of.get(piece.feature, -1))
                for sender, piece in self.in_layout_order
            ]
            self._fused = FusedRegroup(self._columns, numbers, device)

    def divisors(self, ids: Mapping[str, Ids]) -> Tensor | None:
        """What sums are divided by, float32 [features with mean pooling, B], at least 1; ids: of the B examples."""
        lengths = [ids[name].lengths for name in self.mean]
        return torch.stack([of.clamp(min=1).to(torch.float32) for of in lengths if of is not None]) if lengths else None

    def assemble(self, blocks: Tensor, divisors: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
        """[sum over senders of B x columns(sender)] -> [B, columns of all], in that type."""
        if self._in_place and (self._fused is None or blocks.dtype == dtype):
            return blocks.view(size, self._columns[0]).to(dtype)
        if self._fused is not None:
            return self._fused.assemble(blocks, divisors, size, dtype)
        if not any(self._columns):
            return blocks.new_empty(size, 0, dtype=dtype)
        senders = self._split(blocks, size)
        out = torch.cat(
            [senders[s][:, piece.offset : piece.offset + piece.columns] for s, piece in self.in_layout_order], dim=1
        )
        if divisors is not None:
            out = out.float()
            for _, piece in self.in_layout_order:
                if piece.feature in self._divisor_of:
                    divisor = divisors[self._divisor_of[piece.feature]].unsqueeze(1)
                    out[:, piece.start : piece.start + piece.columns].div_(divisor)
        return out.to(dtype)

    def scatter(
        self, gradient: Tensor, divisors: Tensor | None, size: int, dtype: torch.dtype, divide: int = 1
    ) -> Scattered:
        """The gradient of `assemble`, divided by a number besides, in the type in which it travels."""
        if self._fused is not None:
            return Scattered(*self._fused.scatter(gradient, divisors, size, dtype, divide))
        if self._in_place:
            return Scattered((gradient.float() / divide if divide > 1 else gradient).to(dtype).reshape(-1), None)
        gradient = gradient.float()
        blocks = gradient.new_empty(size * sum(self._columns), dtype=dtype)
        for block, own in zip(self._split(blocks, size), self.pieces, strict=True):
            for piece in own:  # one pass: division, type and place
                part = gradient[:, piece.start : piece.start + piece.columns]
                into = block[:, piece.offset : piece.offset + piece.columns]
                if divisors is not None and piece.feature in self._divisor_of:
                    part = part / divide if divide > 1 else part
                    torch.div(part, divisors[self._divisor_of[piece.feature]].unsqueeze(1), out=into)
                elif divide > 1:
                    torch.div(part, divide, out=into)
                else:
                    into.copy_(part)
        return Scattered(blocks, None)

    def _split(self, blocks: Tensor, size: int) -> list[Tensor]:
        """Views [B, columns(sender)] of the senders' blocks."""
        parts = blocks.split([size * width for width in self._columns])
        return [part.view(size, width) for part, width in zip(parts, self._columns, strict=True)]
