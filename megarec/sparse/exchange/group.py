"""Tables spread over one group of ranks: ids to the owners, lookup, pooled embeddings back.

    whole rows, columns    ids --all-to-all--> owner: lookup --all-to-all--> the rank whose examples they are
    rows split             ids --all-to-all--> owners of their rows: partial sums --reduce-scatter--> that rank
    replicated tables      lookup on the spot; the gradients are summed over the group before every rank's same update

The group is the world under the flat exchange and the ranks of a host under the tower exchange. An owner's rows are
the global batch in order, so that the gradient of a row is summed in the same order on every topology. The way back
mirrors the exchange and updates the tables.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch, Ids
from megarec.distributed.collectives import FP32, Channel, Ledger, WireDtypes, all_to_all
from megarec.sparse.exchange.ids import IdExchange, RowSplitter
from megarec.sparse.exchange.regroup import ColumnBlock, Regroup, Scattered, gradient_for_owners, sum_over_owners
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.lookups import Lookup, plan_lookups
from megarec.sparse.placement import Shard, replicated
from megarec.sparse.tables.base import LocalIds, Pooled
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

    @property
    def id_order(self) -> list[str]:
        """See `IdExchange.order`."""
        return self._ids.order

    def distribute(self, ids: Mapping[str, Ids], size: int) -> LocalIds:
        """Ids of `size` examples by feature -> what is looked up in them."""
        return self._ids(ids, size)

    def pool(self, local: LocalIds) -> Pooled:
        """[size, columns of all slots]."""
        return self.tables.pool(local)


class ShardedTables:
    """This rank's part of the tables; see TableGroup for the arguments.

    Attributes:
        pieces: what lies where in the blocks that `pool` returns: those of every rank, then the sum of those split by
            rows.
        messages: the types in which embeddings and their gradients travel; with one rank, nothing does.
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
        self._channel, self._blocks = channel, blocks
        self.messages = messages if channel.size > 1 else FP32
        by_table = {table: [s for s in shards if s.table == table] for table in {s.table for s in shards}}
        backends = {table: requested_backend(own, config, device.type).backend for table, own in by_table.items()}
        fused, triton = ([t for t, backend in backends.items() if backend == kind] for kind in ("fbgemm", "triton"))
        routes = plan_lookups(layout, shards, channel.size, fused, triton)
        self._split = RowSplitter(routes.slots, device)
        sources = [[slot.source for slot in slots] for slots in routes.slots]
        self._ids = IdExchange(sources, channel, routes.index_dtype, device, blocks)
        mine = routes.slots[channel.rank]
        emitted = self.messages.forward
        self.tables = LocalTables(mine, layout, shards, choices, config, channel, device, output=emitted)

        whole = [[slot for slot in slots if not slot.by_rows] for slots in routes.slots]
        by_rows = [slot for slot in mine if slot.by_rows]
        self._columns = [sum(slot.columns for slot in slots) for slots in whole]
        self._row_columns = sum(slot.columns for slot in by_rows)
        leading = next((index for index, slot in enumerate(mine) if slot.by_rows), len(mine))
        self._before_rows = sum(slot.columns for slot in mine[:leading])
        senders = [*(whole if any(self._columns) else []), *([by_rows] if by_rows else [])]
        self.pieces = [[_column_block(slot) for slot in slots] for slots in senders]

    @property
    def id_order(self) -> list[str]:
        """See `IdExchange.order`; parts of features whose rows are split are among them."""
        return self._ids.order

    def distribute(self, ids: Mapping[str, Ids], size: int) -> LocalIds:
        """Ids of `size` examples by feature -> what this rank looks up."""
        return self._ids(self._split(ids, size), size)

    def pool(self, local: LocalIds, size: int) -> Pooled:
        """The blocks of embeddings of this rank's `size` examples (see `pieces`), one after another; collective, as is
        the update."""
        pooled = self.tables.pool(local)
        whole, by_rows = self._parts(pooled.values)
        blocks = []
        if any(self._columns):
            flat = self._by_rank(whole, size).reshape(-1).to(self.messages.forward)
            sent, received = self._sizes(size)
            blocks.append(all_to_all(flat, received, sent, self._channel, "embeddings"))
        if self._row_columns:
            partial = self._by_rank(by_rows, size).reshape(-1, self._row_columns)
            blocks.append(sum_over_owners(partial, self._channel, self.messages).reshape(-1))
        sizes = [block.numel() for block in blocks]

        def update(gradient: Tensor) -> None:
            pooled.update(self._to_owners(list(gradient.split(sizes)), size))

        return Pooled(blocks[0] if len(blocks) == 1 else torch.cat(blocks), update)

    def _to_owners(self, gradients: list[Tensor], size: int) -> Tensor:
        """The gradients of the blocks -> that of what this rank looked up."""
        whole = by_rows = None
        if self._row_columns:
            gathered = gradient_for_owners(gradients.pop().view(-1, self._row_columns), self._channel, self.messages)
            by_rows = self._in_batch_order(gathered, size)
        if gradients:
            sent, received = self._sizes(size)
            message = gradients[0].to(self.messages.backward)
            flat = all_to_all(message, sent, received, self._channel, "embeddings", "backward")
            columns = self._columns[self._channel.rank]
            whole = self._in_batch_order(flat.view(self._channel.size * size, columns), size)
        if whole is None or by_rows is None:
            found = by_rows if whole is None else whole
            assert found is not None
            return found
        own, before = self._columns[self._channel.rank], self._before_rows
        first, last = whole.split([before, own - before], dim=1)
        return torch.cat([first, by_rows, last], dim=1)

    def _sizes(self, size: int) -> tuple[list[int], list[int]]:
        """Numbers that this rank sends to every rank, and that it receives from each, on the way forward."""
        columns = self._columns[self._channel.rank]
        return [size * columns] * self._channel.size, [size * width for width in self._columns]

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

    def _in_batch_order(self, gradient: Tensor, size: int) -> Tensor:
        """The reverse of `_by_rank`."""
        if self._blocks == 1:
            return gradient
        blocks, ranks = self._blocks, self._channel.size
        return gradient.view(ranks, blocks, size // blocks, gradient.shape[1]).transpose(0, 1).reshape(gradient.shape)


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


@dataclass(frozen=True)
class Exchanged:
    """What an exchange brings, and the way back in two steps.

    Attributes:
        values: [B, columns].
        scatter: takes the gradient of `values` and returns that of what the ranks sent; changes nothing.
        update: takes what `scatter` made: the gradients travel and the tables change; collective.
    """

    values: Tensor
    scatter: Callable[[Tensor], Scattered]
    update: Callable[[Tensor], None]


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
        # A gradient that only travels takes the type of its message; those of replicated tables are summed in float32.
        travels = self._sharded is not None and self._replicated is None
        self._wire = self._sharded.messages.backward if self._sharded is not None and travels else torch.float32
        parts = [part for part in (self._sharded, self._replicated) if part is not None]
        self.tables: tuple[LocalTables, ...] = tuple(part.tables for part in parts)
        self._assembly = Regroup(
            [block for part in parts for block in part.pieces],
            device,
            [f.name for f in layout.features if f.multi_valued and f.pooling == "mean"],
        )

    @property
    def id_order(self) -> list[str]:
        """See `IdExchange.order`; those that are looked up on the spot come last."""
        return [name for part in (self._sharded, self._replicated) if part is not None for name in part.id_order]

    def distribute(self, batch: Batch) -> Distributed:
        """Send the ids of a batch to the owners; reads no table."""
        return self.distribute_ids(batch.ids, batch.size)

    def distribute_ids(self, ids: Mapping[str, Ids], size: int) -> Distributed:
        """`distribute`, of B examples given by feature."""
        local = None if self._sharded is None else self._sharded.distribute(ids, size)
        same = None if self._replicated is None else self._replicated.distribute(ids, size)
        return Distributed(ids, size, local, same)

    def pool(self, batch: Distributed, dtype: torch.dtype = torch.float32, divide: int = 1) -> Exchanged:
        """Pooled embeddings of this rank's examples, [B, width of the group's features] in layout order; collective.

        Args:
            dtype: of the result.
            divide: what the gradient is divided by besides.
        """
        size, divisors = batch.size, self._assembly.divisors(batch.ids)
        parts = []
        if self._sharded is not None:
            assert batch.local is not None
            parts.append(self._sharded.pool(batch.local, size))
        if self._replicated is not None:
            assert batch.replicated is not None
            parts.append(self._replicated.pool(batch.replicated))
        flat = [part.values.reshape(-1) for part in parts]
        sizes = [values.numel() for values in flat]
        if not parts:  # nothing but numeric features: [B, 0], with a way back that leads nowhere
            flat = [torch.empty(0, device=self._device)]
        values = self._assembly.assemble(flat[0] if len(flat) == 1 else torch.cat(flat), divisors, size, dtype)

        def update(gradient: Tensor) -> None:
            for part, own in zip(parts, gradient.split(sizes), strict=True):
                part.update(own.view(part.values.shape))

        return Exchanged(
            values, lambda gradient: self._assembly.scatter(gradient, divisors, size, self._wire, divide), update
        )
