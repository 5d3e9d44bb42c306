"""Who looks up what, worked out once: slots per rank, and where their columns belong in the matrix [B, width].

A slot is one feature looked up in one shard. A rank's slots are sorted so that features which share a table are
neighbours (both table backends update such a table once), each backend's tables lie together, and those of the torch
backend by width. All ranks derive the same routes from the same layout and shards.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from megarec.embeddings.layout import EmbeddingLayout, Feature
from megarec.embeddings.placement import Shard


@dataclass(frozen=True)
class Slot:
    """One feature looked up in one shard.

    Attributes:
        start: first column of its output in the matrix [B, width].
        offset: first column of its output among the columns of its rank.
    """

    feature: Feature
    shard: Shard
    start: int
    offset: int

    @property
    def columns(self) -> int:
        return self.shard.columns


@dataclass(frozen=True)
class Routes:
    """Slots by rank.

    Attributes:
        slots: slots[r] are the slots of rank r, in the order of its output columns.
        index_dtype: of ids on the wire and in lookups: int32 where ids travel and every table is small enough.
    """

    slots: tuple[tuple[Slot, ...], ...]
    index_dtype: torch.dtype

    def columns(self, rank: int) -> int:
        """Width of the pooled output of a rank, over all its slots."""
        return sum(slot.columns for slot in self.slots[rank])


def build_routes(layout: EmbeddingLayout, shards: Sequence[Shard], world_size: int, fused: Collection[str]) -> Routes:
    """Routes for a placement.

    Args:
        fused: tables whose slots come before the others of a rank (FBGEMM's before those of torch).
    """
    position = {table.name: index for index, table in enumerate(layout.tables)}
    features = {name: [f for f in layout.features if f.table == name] for name in position}
    by_rank: list[tuple[Slot, ...]] = []
    for rank in range(world_size):
        mine = sorted((shard for shard in shards if shard.rank == rank), key=lambda shard: position[shard.table])
        widths = {columns: index for index, columns in enumerate(dict.fromkeys(shard.columns for shard in mine))}
        ranking = {shard: -1 if shard.table in fused else widths[shard.columns] for shard in mine}
        slots: list[Slot] = []
        offset = 0
        for shard in sorted(mine, key=ranking.__getitem__):
            for feature in features[shard.table]:
                slots.append(Slot(feature, shard, feature.start + shard.column_start, offset))
                offset += shard.columns
        by_rank.append(tuple(slots))
    small = world_size > 1 and all(table.rows < 2**31 for table in layout.tables)
    return Routes(tuple(by_rank), torch.int32 if small else torch.int64)
