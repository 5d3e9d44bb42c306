"""Sums over the ranks that hold columns of the same table.

Row-wise Adagrad adds the mean of g^2 over the whole row to its state, but the owner of a column slice sees only its
part of the row. All owners of a table look up the same ids in the same order, hence the same unique rows: they
exchange their partial sums, and each adds all of them in the same order, so that every copy of the state stays equal
to the last bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megarec.embeddings.placement import Shard
from megarec.parallel.collectives import Channel, all_to_all


class CoOwners:
    """Which ranks hold columns of each table of this rank; every rank of the channel must take part in `sum`."""

    def __init__(self, mine: Sequence[Shard], shards: Sequence[Shard], channel: Channel, device: torch.device) -> None:
        self._channel = channel
        self._device = device
        order = {table: position for position, table in enumerate(dict.fromkeys(shard.table for shard in shards))}
        self._in_table_order = sorted(range(len(mine)), key=lambda t: order[mine[t].table])
        self._owners = [
            [
                s.rank
                for s in sorted(shards, key=lambda s: s.column_start)
                if (s.table, s.row_start) == (shard.table, shard.row_start)
            ]
            for shard in mine
        ]

    def sum(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sum partial vectors over the owners of each table, in column order.

        Args:
            parts: float32 [U_t] for each table t of this rank, in the order of `mine`.
        """
        rank, ranks = self._channel.rank, range(self._channel.size)
        shared = [[t for t in self._in_table_order if r != rank and r in self._owners[t]] for r in ranks]
        sizes = [sum(parts[t].numel() for t in tables) for tables in shared]
        message = torch.cat([parts[t] for tables in shared for t in tables] or [torch.empty(0, device=self._device)])
        received = all_to_all(message, sizes, sizes, self._channel, "squares", "backward")
        from_rank = {(rank, t): part for t, part in enumerate(parts)}
        order = [(r, t) for r in ranks for t in shared[r]]
        pieces = received.split([parts[t].numel() for _, t in order])
        from_rank.update(zip(order, pieces, strict=True))
        return [torch.stack([from_rank[r, t] for r in owners]).sum(dim=0) for t, owners in enumerate(self._owners)]
