"""Tables spread over one group of ranks: ids to the owners, lookup, pooled embeddings back.

    whole rows, columns    ids --all-to-all--> owner: lookup --all-to-all--> the rank whose examples they are
    rows split             ids --all-to-all--> owners of their rows: partial sums --reduce-scatter--> that rank
    replicated tables      lookup on the spot; the gradients are summed over the group before every rank's same update

The group is the world under the flat exchange and the ranks of a host under the tower exchange. An owner's rows are
the global batch in order, so that the gradient of a row is summed in the same order on every topology. The backward
pass mirrors the exchange and updates the tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch, Ids
from megarec.distributed.collectives import Channel, Ledger, WireDtypes, all_to_all_with_grad
from megarec.sparse.exchange.ids import IdExchange, RowSplitter
from megarec.sparse.exchange.regroup import ColumnBlock, Regroup, sum_over_owners
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.lookups import Lookup, plan_lookups
from megarec.sparse.placement import Shard, replicated
from megarec.sparse.tables.base import LocalIds
from megarec.sparse.tables.local import Choice, LocalTables, choose_backends, requested_backend


class ReplicatedTables:
    """Tables that every rank of a group holds whole: no ids and no embeddings travel.

    Args:
        shards: this rank's.
        channel: whose ranks hold the same tables.

    Attributes:
        pieces: what lies where in the block that `pool` returns.
    """

    def __init__(
        self,
        layout: EmbeddingLayout,
        shards: tuple[Shard, ...],
        choices: dict[str, Choice],
        config: EmbeddingConfig,
        channel: Channel,
        device: torch.device,
    ) -> None:
        slots = plan_lookups(layout, shards, channel.size).slots[channel.rank]
        alone = Channel(channel.name, None, 0, 1, Ledger())
        self._ids = IdExchange([[slot.feature for slot in slots]], alone, torch.int64, device)
        self.tables = LocalTables(slots, layout, shards, choices, config, channel, device, replicated=True)
        self.pieces = [[ColumnBlock(slot.feature.name, slot.start, slot.offset, slot.columns) for slot in slots]]

    def distribute(self, ids: Mapping[str, Ids], size: int) -> LocalIds:
        """Ids of `size` examples by feature -> what is looked up in them."""
        return self._ids(ids, size)

    def pool(self, local: LocalIds) -> Tensor:
        """float32 [size, columns of all slots]."""
        return self.tables.forward(local)


class ShardedTables:
    """This rank's part of the tables; see TableGroup for the arguments.

    Attributes:
        pieces: what lies where in the blocks that `pool` returns: those of every rank, then the sum of those split by
            rows.
    """

    def __init__(
        self,
        layout: EmbeddingLayout,
        shards: tuple[Shard, ...],
        choices: dict[str, Choice],
        config: EmbeddingConfig,
        channel: Channel,
        *,
        blocks: int,
        messages: WireDtypes,
        device: torch.device,
    ) -> None:
        self._channel, self._blocks, self._messages = channel, blocks, messages
        by_table = {table: [s for s in shards if s.table == table] for table in {s.table for s in shards}}
        backends = {table: requested_backend(own, config, device.type).backend for table, own in by_table.items()}
        fused, triton = ([t for t, backend in backends.items() if backend == kind] for kind in ("fbgemm", "triton"))
        routes = plan_lookups(layout, shards, channel.size, fused, triton)
        self._split = RowSplitter(routes.slots, device)
        sources = [[slot.source for slot in slots] for slots in routes.slots]
        self._ids = IdExchange(sources, channel, routes.index_dtype, device, blocks)
        mine = routes.slots[channel.rank]
        self.tables = LocalTables(mine, layout, shards, choices, config, channel, device)

        whole = [[slot for slot in slots if not slot.by_rows] for slots in routes.slots]
        by_rows = [slot for slot in mine if slot.by_rows]
        self._columns = [sum(slot.columns for slot in slots) for slots in whole]
        self._row_columns = sum(slot.columns for slot in by_rows)
        leading = next((index for index, slot in enumerate(mine) if slot.by_rows), len(mine))
        self._before_rows = sum(slot.columns for slot in mine[:leading])
        senders = [*(whole if any(self._columns) else []), *([by_rows] if by_rows else [])]
        self.pieces = [[_column_block(slot) for slot in slots] for slots in senders]

    def distribute(self, ids: Mapping[str, Ids], size: int) -> LocalIds:
        """Ids of `size` examples by feature -> what this rank looks up."""
        return self._ids(self._split(ids, size), size)

    def pool(self, local: LocalIds, size: int) -> list[Tensor]:
        """The blocks of embeddings of this rank's `size` examples; see `pieces`."""
        whole, by_rows = self._parts(self.tables.forward(local))
        blocks = []
        if any(self._columns):
            ranks, columns = self._channel.size, self._columns[self._channel.rank]
            sent, received = [size * columns] * ranks, [size * width for width in self._columns]
            flat = self._by_rank(whole, size).reshape(-1)
            blocks.append(all_to_all_with_grad(flat, received, sent, self._channel, "embeddings", self._messages))
        if self._row_columns:
            partial = self._by_rank(by_rows, size).reshape(-1, self._row_columns)
            blocks.append(sum_over_owners(partial, self._channel, self._messages))
        return blocks

    def _parts(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of whole rows, and those of tables split by rows, which lie together."""
        if not self._row_columns or not any(self._columns):
            return pooled, pooled
        own, before = self._columns[self._channel.rank], self._before_rows
        first, by_rows, last = pooled.split([before, self._row_columns, own - before], dim=1)
        return torch.cat([first, last], dim=1), by_rows

    def _by_rank(self, pooled: Tensor, size: int) -> Tensor:
        """Rows in the order of the global batch -> by the rank whose examples they are."""
        if self._blocks == 1:
            return pooled
        blocks, ranks = self._blocks, self._channel.size
        return pooled.reshape(blocks, ranks, size // blocks, pooled.shape[1]).transpose(0, 1)


def _column_block(slot: Lookup) -> ColumnBlock:
    return ColumnBlock(slot.feature.name, slot.start, slot.offset, slot.columns)


@dataclass(frozen=True)
class Distributed:
    """A batch whose ids have reached their owners.

    Attributes:
        ids: of this rank's own examples.
        size: B, how many examples those are.
        local: what this rank looks up in tables that are spread over the group; None: there are none.
        replicated: what it looks up in replicated tables; None: there are none.
    """

    ids: Mapping[str, Ids]
    size: int
    local: LocalIds | None
    replicated: LocalIds | None


class TableGroup:
    """The tables of a group and this rank's part of them.

    Args:
        layout: of the group's features.
        shards: of the group's tables; their ranks are places in the channel.
        blocks: of how many equal blocks, in the order of the global batch, the examples of a rank consist: one for
            each peer that handed them over.

    Attributes:
        layout: of the group's features.
        tables: this rank's, those that are spread over the group before the replicated ones.
    """

    def __init__(
        self,
        layout: EmbeddingLayout,
        shards: tuple[Shard, ...],
        config: EmbeddingConfig,
        channel: Channel,
        *,
        blocks: int,
        messages: WireDtypes,
        device: torch.device,
    ) -> None:
        self.layout, self._device = layout, device
        self.choices = choose_backends(layout, shards, config, device)
        names = replicated(shards)
        spread = tuple(shard for shard in shards if shard.table not in names)
        own = tuple(s for s in shards if s.table in names and s.rank == channel.rank)
        self._sharded = self._replicated = None
        if spread:
            self._sharded = ShardedTables(
                layout, spread, self.choices, config, channel, blocks=blocks, messages=messages, device=device
            )
        if own:
            self._replicated = ReplicatedTables(layout, own, self.choices, config, channel, device)
        parts = [part for part in (self._sharded, self._replicated) if part is not None]
        self.tables: tuple[LocalTables, ...] = tuple(part.tables for part in parts)
        self._assembly = Regroup(
            [block for part in parts for block in part.pieces],
            [f.name for f in layout.features if f.multi_valued and f.pooling == "mean"],
        )

    def distribute(self, batch: Batch) -> Distributed:
        """Send the ids of a batch to the owners; reads no table."""
        return self.distribute_ids(batch.ids, batch.size)

    def distribute_ids(self, ids: Mapping[str, Ids], size: int) -> Distributed:
        """`distribute`, of B examples given by feature."""
        local = None if self._sharded is None else self._sharded.distribute(ids, size)
        same = None if self._replicated is None else self._replicated.distribute(ids, size)
        return Distributed(ids, size, local, same)

    def pool(self, batch: Distributed) -> Tensor:
        """Pooled embeddings of this rank's examples, float32 [B, width of the group's features] in layout order."""
        if not self.tables:  # nothing but numeric features: [B, 0], with a way back that leads nowhere
            return torch.empty(batch.size, 0, device=self._device, requires_grad=torch.is_grad_enabled())
        blocks = []
        if self._sharded is not None:
            assert batch.local is not None
            blocks += self._sharded.pool(batch.local, batch.size)
        if self._replicated is not None:
            assert batch.replicated is not None
            blocks.append(self._replicated.pool(batch.replicated))
        flat = blocks[0] if len(blocks) == 1 else torch.cat([block.reshape(-1) for block in blocks])
        return self._assembly(flat.reshape(-1), batch.ids, batch.size)
