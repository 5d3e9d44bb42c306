"""Ranks agree on an error, or on a number, without pickling anything."""

import torch
import torch.distributed as dist
from torch import Tensor

from megarec.checkpoint.format import DamagedCheckpoint
from megarec.errors import UserError
from megarec.topology import Topology


def raise_together(error: UserError | None, topology: Topology, device: torch.device) -> None:
    """Raise the error of the first rank that has one, on every rank; collective."""
    if topology.world is None:
        if error is not None:
            raise error
        return
    text = str(error).encode() if error is not None else b""
    kind = 0 if error is None else 1 if isinstance(error, DamagedCheckpoint) else 2
    mine = torch.tensor([kind, len(text)], device=device)
    kinds = torch.empty(topology.world_size * 2, dtype=mine.dtype, device=device)
    dist.all_gather_single(kinds, mine, group=topology.world)
    for rank, (kind, size) in enumerate(kinds.view(-1, 2).tolist()):
        if kind:
            letters = torch.zeros(size, dtype=torch.uint8, device=device)
            if rank == topology.rank:
                letters.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            dist.broadcast(letters, rank, group=topology.world)
            message = bytes(letters.tolist()).decode()
            raise DamagedCheckpoint(message) if kind == 1 else UserError(message)


def from_rank_0(number: int, topology: Topology, device: torch.device) -> int:
    """Rank 0's number on every rank; collective."""
    shared: Tensor = torch.tensor([number], device=device)
    if topology.world is not None:
        dist.broadcast(shared, 0, group=topology.world)
    return int(shared)


def told_by_ranks(text: str, topology: Topology, device: torch.device, most: int = 8) -> dict[int, str]:
    """The texts of all ranks that have one, by rank, on every rank; only the first `most` of them; collective."""
    letters = text.encode()
    mine = torch.tensor([len(letters)], device=device)
    sizes = mine.new_empty(topology.world_size)
    if topology.world is None:
        return {0: text} if text else {}
    dist.all_gather_single(sizes, mine, group=topology.world)
    told: dict[int, str] = {}
    for rank, size in enumerate(sizes.tolist()):
        if size and len(told) < most:
            shared = torch.zeros(size, dtype=torch.uint8, device=device)
            if rank == topology.rank:
                shared.copy_(torch.frombuffer(bytearray(letters), dtype=torch.uint8))
            dist.broadcast(shared, rank, group=topology.world)
            told[rank] = bytes(shared.tolist()).decode()
    return told
