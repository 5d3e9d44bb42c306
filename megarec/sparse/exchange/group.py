"""Tables spread over one group of ranks: ids to the owners, lookup, pooled embeddings back.

    whole rows, columns    ids --all-to-all--> owner: lookup --all-to-all--> the rank whose examples they are
    rows split             ids --all-to-all--> owners of their rows: partial sums --reduce-scatter--> that rank
    replicated tables      lookup on the spot; the gradients are summed over the group before every rank's same update

The group is the world under the flat exchange and the ranks of a host under the tower exchange. An owner's rows are
the global batch in order, so that the gradient of a row is summed in the same order on every topology. The way back
mirrors the exchange and updates the tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch, Ids
from megarec.distributed.collectives import FP32, Channel, Ledger, WireDtypes, all_to_all_into
from megarec.sparse.exchange.ids import IdExchange, RowSplitter
from megarec.sparse.exchange.parts import PartedExchange, columns_of, joined, rows_of
from megarec.sparse.exchange.regroup import ColumnBlock, Regroup, gradient_for_owners, sum_over_owners
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.lookups import Lookup, plan_lookups
from megarec.sparse.placement import Shard
from megarec.sparse.tables.base import LocalIds, Pooled
from megarec.sparse.tables.local import Choice, LocalTables, choose_backends, routes_of, split_replicated


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
        plan = plan_lookups(layout, shards, channel.size)
        slots = plan.slots[channel.rank]
        alone = Channel(channel.name, None, 0, 1, Ledger())
        self.ids = IdExchange([[slot.feature for slot in slots]], alone, plan.index_dtype, device)
        self.tables = LocalTables(slots, layout, shards, choices, config, channel, device, replicated=True)
        self.pieces = [[ColumnBlock(slot.feature.name, slot.start, slot.offset, slot.columns) for slot in slots]]

    def distribute(self, ids: Mapping[str, Ids], size: int) -> LocalIds:
        """Ids of `size` examples by feature -> what is looked up in them."""
        return self.ids(ids, size)

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
        routes = routes_of(layout, shards, config, channel.size, device)
        self._split = RowSplitter(routes.slots, device)
        sources = [[slot.source for slot in slots] for slots in routes.slots]
        self.ids = IdExchange(sources, channel, routes.index_dtype, device, blocks)
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

    def distribute(self, ids: Mapping[str, Ids], size: int) -> LocalIds:
        """Ids of `size` examples by feature -> what this rank looks up."""
        return self.ids(self._split(ids, size), size)

    def pool(self, local: LocalIds, size: int, parts: int) -> "ShardedLookup":
        """The embeddings of this rank's `size` examples, in so many parts; collective."""
        return ShardedLookup(self, self.tables.pool(local), size, parts)

    def whole_rows(self, pooled: Tensor, size: int, parts: int) -> PartedExchange | None:
        """Send those of whole rows on their way; None: there are none."""
        if not any(self._columns):
            return None
        sent, received = self._sizes(size)
        blocks = self._by_rank(self._parts(pooled)[0], size).reshape(-1)
        return PartedExchange(blocks, sent[:1], received, self._channel, "embeddings", self.messages, parts)

    def rows_of_all(self, pooled: Tensor, size: int) -> Tensor | None:
        """[size, columns]: the sums of tables that are split by rows, over their owners; None: there are none."""
        if not self._row_columns:
            return None
        partial = self._by_rank(self._parts(pooled)[1], size).reshape(-1, self._row_columns)
        return sum_over_owners(partial, self._channel, self.messages)

    def to_owners(self, whole: Tensor | None, by_rows: Tensor | None, size: int) -> Tensor:
        """The gradients of both, as they came back and [size, columns] -> that of what this rank looked up."""
        columns = self._columns[self._channel.rank]
        if by_rows is not None:
            by_rows = self._in_batch_order(gradient_for_owners(by_rows, self._channel, self.messages), size)
        if whole is not None:
            whole = self._in_batch_order(whole.view(self._channel.size * size, columns), size)
        return self._together(whole, by_rows)

    def _together(self, whole: Tensor | None, by_rows: Tensor | None) -> Tensor:
        """Both kinds of columns in the order of the slots."""
        if whole is None or by_rows is None:
            found = by_rows if whole is None else whole
            assert found is not None
            return found
        first, last = whole.split([self._before_rows, whole.shape[1] - self._before_rows], dim=1)
        return torch.cat([first, by_rows, last], dim=1)

    def by_peer(self, local: LocalIds, size: int) -> Pooled:
        """Of `TableGroup.by_peer`; collective, as is the update."""
        pooled, peers = self.tables.pool(local), self._blocks
        sent, received = self._sizes(size // peers)
        blocks = []
        if any(self._columns):
            message = self._parts(pooled.values)[0].to(self.messages.forward).view(peers, sum(sent))
            if self._channel.size > 1:
                by_rank, message = message, message.new_empty(peers, sum(received))
                all_to_all_into(message, by_rank, received, sent, self._channel, "embeddings", "forward", peers)
            blocks.append(message)
        if (sums := self.rows_of_all(pooled.values, size)) is not None:
            blocks.append(sums.view(peers, -1))
        widths = [block.shape[1] for block in blocks]

        def update(gradient: Tensor) -> None:
            gradients = list(gradient.split(widths, dim=1))
            own = by_rows = None
            if self._row_columns:
                of_sums = gradients.pop().reshape(-1, self._row_columns)
                by_rows = self._in_batch_order(gradient_for_owners(of_sums, self._channel, self.messages), size)
            if gradients:
                own = gradients[0].to(self.messages.backward)
                if self._channel.size > 1:
                    message, own = own, own.new_empty(peers, sum(sent))
                    all_to_all_into(own, message, sent, received, self._channel, "embeddings", "backward", peers)
                own = own.reshape(self._channel.size * size, self._columns[self._channel.rank])
            pooled.update(self._together(own, by_rows))

        return Pooled(blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1), update)

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


class ShardedLookup:
    """What a step looked up in spread tables, part by part of this rank's examples, and the way back.

    What is split by rows is one message of all parts: a sum over ranks may take another order in smaller messages.
    """

    def __init__(self, tables: ShardedTables, pooled: Pooled, size: int, parts: int) -> None:
        self._tables, self._update, self._size, self._parts = tables, pooled.update, size, parts
        self._whole = tables.whole_rows(pooled.values, size, parts)
        self._by_rows = tables.rows_of_all(pooled.values, size)
        self._row_gradients: list[Tensor] = []

    def arrive(self, part: int) -> Tensor:
        """The blocks of a part (see `ShardedTables.pieces`), one after another."""
        blocks = [] if self._whole is None else [self._whole.arrive(part)]
        if self._by_rows is not None:
            blocks.append(rows_of(self._by_rows, part, self._parts).reshape(-1))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def leave(self, gradient: Tensor) -> None:
        """Take the gradient of the blocks of a part."""
        columns = 0 if self._by_rows is None else self._by_rows.shape[1]
        of_rows = columns * self._size // self._parts
        whole, by_rows = gradient.split([gradient.numel() - of_rows, of_rows])
        if self._whole is not None:
            self._whole.leave(whole)
        if self._by_rows is not None:
            self._row_gradients.append(by_rows.view(-1, columns))

    def update(self) -> None:
        """Change the tables; collective."""
        whole = None if self._whole is None else self._whole.gradient()
        by_rows = None if self._by_rows is None else joined(self._row_gradients)
        self._update(self._tables.to_owners(whole, by_rows, self._size))

    def forget(self) -> None:
        """In place of `update`: wait for what is on its way."""
        if self._whole is not None:
            self._whole.gradient()


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
        own: ids of this rank's examples alone, where `ids` are those of its peers' as well.
    """

    ids: Mapping[str, Ids]
    size: int
    local: LocalIds | None
    replicated: LocalIds | None
    own: Mapping[str, Ids] | None = None


class Exchanged(Protocol):
    """What an exchange brings, part by part of this rank's examples, and the way back; every method is collective."""

    def arrive(self, part: int) -> Tensor:
        """The embeddings of a part, [examples, columns]; parts are asked for in their order, each once."""

    def leave(self, part: int, gradient: Tensor) -> Tensor | None:
        """Take the gradient of a part; with the last one the gradients of all that lies on the way are made; changes
        nothing.

        Returns:
            Float32 scalar, finite only if every element of the gradient is; None: it would be a pass of its own.
        """

    def update(self) -> None:
        """The tables change."""

    def forget(self) -> None:
        """In place of `update`."""


class GroupLookup:
    """An `Exchanged` of the tables of a group.

    Args:
        divide: what gradients are divided by besides.
        divisors: see `Regroup.divisors`.
    """

    def __init__(
        self,
        assembly: Regroup,
        sharded: ShardedLookup | None,
        replicated: Pooled | None,
        divisors: Tensor | None,
        size: int,
        *,
        parts: int,
        dtype: torch.dtype,
        wire: torch.dtype,
        divide: int,
        device: torch.device,
    ) -> None:
        self._assembly, self._sharded, self._replicated = assembly, sharded, replicated
        self._divisors, self._size, self._parts = divisors, size, parts
        self._dtype, self._wire, self._divide, self._device = dtype, wire, divide, device
        self._replicated_gradients: list[Tensor] = []

    def arrive(self, part: int) -> Tensor:
        flat = [] if self._sharded is None else [self._sharded.arrive(part)]
        if self._replicated is not None:
            flat.append(rows_of(self._replicated.values, part, self._parts).reshape(-1))
        if not flat:  # nothing but numeric features: [B, 0], with a way back that leads nowhere
            flat = [torch.empty(0, device=self._device)]
        blocks = flat[0] if len(flat) == 1 else torch.cat(flat)
        divisors = columns_of(self._divisors, part, self._parts)
        return self._assembly.assemble(blocks, divisors, self._size // self._parts, self._dtype)

    def leave(self, part: int, gradient: Tensor) -> Tensor | None:
        size = self._size // self._parts
        divisors = columns_of(self._divisors, part, self._parts)
        blocks, total = self._assembly.scatter(gradient, divisors, size, self._wire, self._divide)
        if self._replicated is not None:
            columns = self._replicated.values.shape[1]
            blocks, own = blocks.split([blocks.numel() - size * columns, size * columns])
            self._replicated_gradients.append(own.view(size, columns))
        if self._sharded is not None:
            self._sharded.leave(blocks)
        return total

    def update(self) -> None:
        if self._sharded is not None:
            self._sharded.update()
        if self._replicated is not None:
            self._replicated.update(joined(self._replicated_gradients))

    def forget(self) -> None:
        if self._sharded is not None:
            self._sharded.forget()


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
        id_order: features in the order in which their ids are sent (`IdExchange.order`), then those that are not sent.
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
        self.layout, self._device, self._blocks = layout, device, blocks
        self.choices = choose_backends(layout, shards, config, device)
        spread, own = split_replicated(shards, channel.rank)
        self._sharded = self._replicated = None
        if spread:
            self._sharded = ShardedTables(
                layout, spread, self.choices, config, channel, blocks=blocks, messages=messages, device=device
            )
        if own:
            self._replicated = ReplicatedTables(layout, own, self.choices, config, channel, device)
        # A gradient that only travels takes the type of its message; those of replicated tables are summed in float32.
        travels = self._sharded is not None and self._replicated is None
        self.wire = self._sharded.messages.backward if self._sharded is not None and travels else torch.float32
        parts = [part for part in (self._sharded, self._replicated) if part is not None]
        self.tables: tuple[LocalTables, ...] = tuple(part.tables for part in parts)
        self.id_order = [name for part in parts for name in part.ids.order]
        mean = [f.name for f in layout.features if f.multi_valued and f.pooling == "mean"]
        self._assembly = Regroup([block for part in parts for block in part.pieces], device, mean)

    def distribute(self, batch: Batch) -> Distributed:
        """Send the ids of a batch to the owners; reads no table."""
        return self.distribute_ids(batch.ids, batch.size)

    def distribute_ids(self, ids: Mapping[str, Ids], size: int) -> Distributed:
        """`distribute`, of B examples given by feature."""
        local = None if self._sharded is None else self._sharded.distribute(ids, size)
        same = None if self._replicated is None else self._replicated.distribute(ids, size)
        return Distributed(ids, size, local, same)

    def pool(
        self, batch: Distributed, dtype: torch.dtype = torch.float32, divide: int = 1, parts: int = 1
    ) -> Exchanged:
        """Pooled embeddings of this rank's examples, [B, width of the group's features] in layout order; collective.

        Args:
            dtype: of the result.
            divide: what the gradient is divided by besides.
            parts: in how many parts they travel, while others compute; divides B.
        """
        sharded = replicated = None
        if self._sharded is not None:
            assert batch.local is not None
            sharded = self._sharded.pool(batch.local, batch.size, parts)
        if self._replicated is not None:
            assert batch.replicated is not None
            replicated = self._replicated.pool(batch.replicated)
        return GroupLookup(
            self._assembly, sharded, replicated, self._assembly.divisors(batch.ids), batch.size,
            parts=parts, dtype=dtype, wire=self.wire, divide=divide, device=self._device,
        )  # fmt: skip

    def by_peer(self, batch: Distributed) -> Pooled:
        """[peers, blocks of the examples of each], sums where a mean is wanted; collective, as is the update."""
        parts: list[Pooled] = []
        if self._sharded is not None:
            assert batch.local is not None
            parts.append(self._sharded.by_peer(batch.local, batch.size))
        if self._replicated is not None:
            assert batch.replicated is not None
            same = self._replicated.pool(batch.replicated)
            shape = same.values.shape
            parts.append(Pooled(same.values.reshape(self._blocks, -1), lambda g: same.update(g.reshape(shape))))
        widths = [part.values.shape[1] for part in parts]

        def update(gradient: Tensor) -> None:
            for part, own in zip(parts, gradient.split(widths, dim=1), strict=True):
                part.update(own)

        if not parts:  # nothing but numeric features
            return Pooled(torch.empty(self._blocks, 0, device=self._device), lambda gradient: None)
        return Pooled(parts[0].values if len(parts) == 1 else torch.cat([p.values for p in parts], dim=1), update)
