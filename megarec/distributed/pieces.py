"""The all-to-all itself: what a rank sends to another may lie in several pieces, and so may what it receives.

gloo's own all-to-all posts its sends before its receives. A rank that comes second then may send at
once, and its permission for the other to send waits behind all of its data: two ranks send one after another over a
link that takes both at a time. So on gloo the messages are posted one by one, the receives first, piece by piece and
without a copy. Another backend (NCCL) gets one all-to-all, and one copy on a side that is not in the order of ranks.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Wait = Callable[[], object]
"""Waits for pending messages of this rank: the host on a CPU, the current stream on an accelerator."""


def start_exchange(
    sent: Tensor, received: Tensor, sent_sizes: Sequence[int], received_sizes: Sequence[int],
    group: dist.ProcessGroup, blocks: int = 1,
) -> Wait:  # fmt: skip
    """Start to send block after block to every rank, and to fill `received`, both contiguous.

    Args:
        sent: [blocks x sum of sizes], by rank and within a rank by block; or [blocks, sum of sizes], by block.
        received: the same; both ranks of a message may have chosen differently.
        sent_sizes: elements of a block for each rank.
        received_sizes: elements of a block from each rank.
        blocks: how many; the same on all ranks.
    """
    if _piece_by_piece(group):
        return _post(_pieces(sent, sent_sizes, blocks), _pieces(received, received_sizes, blocks), group)
    if blocks == 1:
        sent, received = sent.view(-1), received.view(-1)
    outgoing = _by_rank(sent, sent_sizes) if sent.dim() == 2 else sent
    incoming = received.new_empty(received.numel()) if received.dim() == 2 else received
    expected, given = ([size * blocks for size in sizes] for sizes in (received_sizes, sent_sizes))
    work = dist.all_to_all_single(incoming, outgoing, expected, given, group=group, async_op=True)

    def wait() -> None:
        work.wait()
        if received.dim() == 2:
            _copy(_pieces(incoming, received_sizes, blocks), _pieces(received, received_sizes, blocks))

    return wait


def _piece_by_piece(group: dist.ProcessGroup) -> bool:
    """Whether messages are posted one by one: on gloo."""
    return str(dist.get_backend(group)) == "gloo"


def _pieces(tensor: Tensor, sizes: Sequence[int], blocks: int) -> list[list[Tensor]]:
    """Views by rank and block."""
    if tensor.dim() == 2:
        rows = [row.split(list(sizes)) for row in tensor.unbind()]
        return [[row[rank] for row in rows] for rank in range(len(sizes))]
    parts = tensor.split([size * blocks for size in sizes])
    return [list(part.view(blocks, size).unbind()) for part, size in zip(parts, sizes, strict=True)]


def _by_rank(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """[blocks, sum of sizes] -> [blocks x sum of sizes] by rank."""
    packed = tensor.new_empty(tensor.numel())
    _copy(_pieces(tensor, sizes, tensor.shape[0]), _pieces(packed, sizes, tensor.shape[0]))
    return packed


def _copy(source: list[list[Tensor]], target: list[list[Tensor]]) -> None:
    """One kernel on an accelerator."""
    torch._foreach_copy_([piece for own in target for piece in own], [piece for own in source for piece in own])


def _post(sent: list[list[Tensor]], received: list[list[Tensor]], group: dist.ProcessGroup) -> Wait:
    """Pieces of a pair of ranks arrive in the order in which they are posted.

    By default a message's timeout is that of the group's rendezvous, not the group's current
    one; so the wait states the group's timeout.
    """
    patience = group._get_backend(torch.device("cpu")).options._timeout
    rank, size = dist.get_rank(group), len(sent)
    work: list[dist.Work | None] = []
    for turn in range(1, size):
        source = dist.get_global_rank(group, (rank - turn) % size)
        work += [dist.irecv(piece, source, group) for piece in received[(rank - turn) % size] if piece.numel()]
    for turn in range(1, size):
        target = dist.get_global_rank(group, (rank + turn) % size)
        work += [dist.isend(piece, target, group) for piece in sent[(rank + turn) % size] if piece.numel()]
    for own, into in zip(sent[rank], received[rank], strict=True):
        into.copy_(own)

    def wait() -> None:
        for posted in work:
            if posted is not None:
                posted.wait(patience)
        work.clear()  # it keeps what was sent

    return wait
