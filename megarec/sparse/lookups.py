"""Who looks up what, worked out once: slots per rank, and where their columns belong in the matrix [B, width].

A slot is one feature looked up in one shard. A rank's slots are sorted so that features which share a table are
neighbours (every backend updates such a table once), each backend's tables lie together, and those of the torch backend
by width. Slots of tables that are split by rows lie together as well, in the same order on every rank: FBGEMM's, then
Triton's, then torch's. What Triton cannot hold here goes to torch, and then lies beside torch's own: its tables of a
rank are one group, which takes part in one exchange of row-wise Adagrad a step, as every other rank's does. All ranks
derive the same routes from the same layout and shards.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from megarec.sparse.layout import EmbeddingLayout, Feature
from megarec.sparse.placement import Shard, split_by_rows


@dataclass(frozen=True)
class Lookup:
    """One feature looked up in one shard.

    Attributes:
        start: first column of its output in the matrix [B, width]; of an unpooled feature, in its row.
        offset: first column of its output among the columns of its rank that travel with it: those of tables split by
            rows go apart from the others.
        by_rows: whether the table is split by rows.
    """

    feature: Feature
    shard: Shard
    start: int
    offset: int
    by_rows: bool = False

    @property
    def columns(self) -> int:
        return self.shard.columns

    @property
    def source(self) -> Feature:
        """Whose ids are looked up: the feature's, or the part of them whose rows lie here."""
        if not self.by_rows:
            return self.feature
        rows = f"[{self.shard.row_start}:{self.shard.row_stop}]"
        return dataclasses.replace(self.feature, name=self.feature.name + rows, multi_valued=True)


@dataclass(frozen=True)
class LookupPlan:
    """Slots by rank.

    Attributes:
        slots: slots[r] are the slots of rank r, in the order of its output columns.
        unpooled: unpooled[r] are those of unpooled features.
        shards: shards[r] are those of rank r, in the order of its slots.
        index_dtype: of ids on the wire and in lookups: int32 where every table is small enough.
    """

    slots: tuple[tuple[Lookup, ...], ...]
    unpooled: tuple[tuple[Lookup, ...], ...]
    shards: tuple[tuple[Shard, ...], ...]
    index_dtype: torch.dtype

    @property
    def sources(self) -> list[list[Feature]]:
        """By rank, whose ids it receives: those of its slots, then those of its unpooled ones."""
        return [[s.source for s in (*own, *rows)] for own, rows in zip(self.slots, self.unpooled, strict=True)]


def plan_lookups(
    layout: EmbeddingLayout,
    shards: Sequence[Shard],
    world_size: int,
    fused: Collection[str] = (),
    triton: Collection[str] = (),
) -> LookupPlan:
    """Routes for a placement.

    Args:
        fused: the tables of FBGEMM.
        triton: those of Triton; the others are torch's.
    """
    position = {table.name: index for index, table in enumerate(layout.tables)}
    features: dict[str, list[Feature]] = {name: [] for name in position}
    unpooled: dict[str, list[Feature]] = {name: [] for name in position}
    for kinds, listed in ((features, layout.features), (unpooled, layout.unpooled)):
        for feature in listed:
            kinds[feature.table].append(feature)
    by_rows = split_by_rows(shards)
    by_rank: list[tuple[Lookup, ...]] = []
    rows: list[tuple[Lookup, ...]] = []
    held: list[tuple[Shard, ...]] = []
    of_rank: list[list[Shard]] = [[] for _ in range(world_size)]
    for shard in shards:
        of_rank[shard.rank].append(shard)
    for own in of_rank:
        mine = sorted(own, key=lambda shard: position[shard.table])
        offsets = {True: 0, False: 0}
        slots: list[Lookup] = []
        mine = _in_order(mine, fused, triton, by_rows)
        for shard in mine:
            split = shard.table in by_rows
            for feature in features[shard.table]:
                slots.append(Lookup(feature, shard, feature.start + shard.column_start, offsets[split], split))
                offsets[split] += shard.columns
        by_rank.append(tuple(slots))
        held.append(tuple(mine))
        rows.append(tuple(Lookup(f, s, s.column_start, 0, s.table in by_rows) for s in mine for f in unpooled[s.table]))
    small = all(table.rows < 2**31 for table in layout.tables)
    return LookupPlan(tuple(by_rank), tuple(rows), tuple(held), torch.int32 if small else torch.int64)


def _in_order(
    shards: Sequence[Shard], fused: Collection[str], triton: Collection[str], by_rows: Collection[str]
) -> list[Shard]:
    """Whole rows of FBGEMM, parts of tables split by rows (FBGEMM, Triton, torch), whole rows of torch, of Triton.

    Each kind in the given order, torch's by width; every rank has the same tables of the middle kinds.
    """

    def kind(shard: Shard) -> int:
        split = shard.table in by_rows
        if shard.table in triton:
            return 2 if split else 5
        if shard.table in fused:
            return 1 if split else 0
        return 3 if split else 4

    widths: dict[tuple[int, int], int] = {}
    for shard in shards:
        widths.setdefault((kind(shard), shard.columns), len(widths))

    def rank(shard: Shard) -> tuple[int, int]:
        return kind(shard), widths[kind(shard), shard.columns] if kind(shard) in (3, 4) else 0

    return sorted(shards, key=rank)
