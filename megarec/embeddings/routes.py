"""Who looks up what, worked out once: slots per rank, and where their columns belong in the matrix [B, width].

A slot is one feature looked up in one shard. A rank's slots are sorted so that features which share a table are
neighbours (both table backends update such a table once) and each backend's tables lie together. All ranks derive
the same routes from the same layout and shards.
"""

from collections.abc import Callable, Sequence
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
        index_dtype: of ids on the wire and in lookups: int32 wherever every table is small enough.
    """

    slots: tuple[tuple[Slot, ...], ...]
    index_dtype: torch.dtype

    def columns(self, rank: int) -> int:
        """Width of the pooled output of a rank, over all its slots."""
        return sum(slot.columns for slot in self.slots[rank])


def build_routes(
    layout: EmbeddingLayout, shards: Sequence[Shard], world_size: int, first: Callable[[str], bool]
) -> Routes:
    """Routes for a placement.

    Args:
        first: whether a table's slots come before those of the other tables of a rank (the backends' order).
    """
    order = {table.name: position for position, table in enumerate(layout.tables)}
    features = {name: [f for f in layout.features if f.table == name] for name in order}
    by_rank: list[tuple[Slot, ...]] = []
    for rank in range(world_size):
        mine = sorted((s for s in shards if s.rank == rank), key=lambda s: (not first(s.table), order[s.table]))
        slots: list[Slot] = []
        offset = 0
        for shard in mine:
            for feature in features[shard.table]:
                slots.append(Slot(feature, shard, feature.start + shard.column_start, offset))
                offset += shard.columns
        by_rank.append(tuple(slots))
    small = all(table.rows < 2**31 for table in layout.tables)
    return Routes(tuple(by_rank), torch.int32 if small else torch.int64)
