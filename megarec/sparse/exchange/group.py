"""Tables spread over one group of ranks: ids to the owners, lookup, pooled embeddings back.

    whole rows, columns    ids --all-to-all--> owner: lookup --all-to-all--> the rank whose examples they are
    rows split             ids --all-to-all--> owners of their rows: partial sums --reduce-scatter--> that rank
    replicated tables      lookup on the spot; the gradients are summed over the group before every rank's same update

The group is the world under the flat exchange and the ranks of a host under the tower exchange. An owner's rows are
the global batch in order, so that the gradient of a row is summed in the same order on every topology. The way back
mirrors the exchange and updates the tables.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch, Ids
from megarec.distributed.collectives import FP32, Channel, Ledger, WireDtypes, all_to_all_into
from megarec.sparse.exchange.ids import IdExchange, RowSplitter
from megarec.sparse.exchange.regroup import ColumnBlock, Regroup, Scattered, gradient_for_owners, sum_over_owners
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.lookups import Lookup, LookupPlan, plan_lookups
from megarec.sparse.placement import Shard, replicated
from megarec.sparse.tables.base import LocalIds, Pooled
from megarec.sparse.tables.local import Choice, LocalTables, choose_backends, requested_backend


class ReplicatedTables:
    """Tables that every rank of a group holds whole: no ids and no embeddings travel.

    Args:
        shards: this rank's.
        channel: whose ranks hold the same tables.
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

    def distribute(self, ids: Mapping[str, Ids], size: int) -> LocalIds:
        """Ids of `size` examples by feature -> what is looked up in them."""
        return self._ids(ids, size)

    def pool(self, local: LocalIds, peers: int) -> Pooled:
        """The columns of all slots, of the examples of each peer: [peers, examples of one x columns]."""
        pooled = self.tables.pool(local)
        shape = pooled.values.shape
        return Pooled(pooled.values.reshape(peers, -1), lambda gradient: pooled.update(gradient.reshape(shape)))


class ShardedTables:
    """This rank's part of the tables; see TableGroup for the arguments.

    Attributes:
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
        peers: int,
        messages: WireDtypes,
        device: torch.device,
    ) -> None:
        self._channel, self._peers = channel, peers
        self.messages = messages if channel.size > 1 else FP32
        routes = _routes(layout, shards, config, channel.size, device)
        self._split = RowSplitter(routes.slots, device)
        sources = [[slot.source for slot in slots] for slots in routes.slots]
        self._ids = IdExchange(sources, channel, routes.index_dtype, device, peers)
        mine = routes.slots[channel.rank]
        emitted = self.messages.forward
        self.tables = LocalTables(mine, layout, shards, choices, config, channel, device, output=emitted)
        self._columns = [sum(slot.columns for slot in slots if not slot.by_rows) for slots in routes.slots]
        self._row_columns = sum(slot.columns for slot in mine if slot.by_rows)
        leading = next((index for index, slot in enumerate(mine) if slot.by_rows), len(mine))
        self._before_rows = sum(slot.columns for slot in mine[:leading])

    def distribute(self, ids: Mapping[str, Ids], size: int) -> LocalIds:
        """Ids of `size` examples by feature -> what this rank looks up."""
        return self._ids(self._split(ids, size), size)

    def pool(self, local: LocalIds, size: int, by_peer: bool) -> Pooled:
        """The blocks of embeddings of this rank's `size` examples, as `TableGroup.blocks`; collective, as is the
        update."""
        pooled = self.tables.pool(local)
        whole, by_rows = self._parts(pooled.values)
        lines = self._peers if by_peer else 1
        blocks = []
        if any(self._columns):
            blocks.append(self._to_examples(whole.to(self.messages.forward), size, by_peer).view(lines, -1))
        if self._row_columns:
            partial = self._by_rank(by_rows, size).reshape(-1, self._row_columns)
            blocks.append(sum_over_owners(partial, self._channel, self.messages).view(lines, -1))
        widths = [block.shape[1] for block in blocks]

        def update(gradient: Tensor) -> None:
            pooled.update(self._to_owners(list(gradient.split(widths, dim=1)), size, by_peer))

        return Pooled(blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1), update)

    def _to_examples(self, whole: Tensor, size: int, by_peer: bool) -> Tensor:
        """Columns of whole rows of all examples, in the order of the global batch -> all columns of this rank's."""
        if self._channel.size == 1:
            return whole
        sent, received = self._sizes(size)
        embeddings = whole.new_empty((self._peers, sum(received)) if by_peer else self._peers * sum(received))
        by_block = whole.view(self._peers, sum(sent))
        all_to_all_into(embeddings, by_block, received, sent, self._channel, "embeddings", "forward", self._peers)
        return embeddings

    def _to_owners(self, gradients: list[Tensor], size: int, by_peer: bool) -> Tensor:
        """The gradients of the blocks -> that of what this rank looked up."""
        whole = by_rows = None
        if self._row_columns:
            of_sums = gradients.pop().reshape(-1, self._row_columns)
            by_rows = self._in_batch_order(gradient_for_owners(of_sums, self._channel, self.messages), size)
        if gradients:
            columns = self._columns[self._channel.rank]
            whole = gradients[0].to(self.messages.backward)
            if self._channel.size > 1:
                sent, received = self._sizes(size)
                message = whole if by_peer else whole.reshape(-1)
                whole = message.new_empty(self._peers, sum(sent))
                all_to_all_into(whole, message, sent, received, self._channel, "embeddings", "backward", self._peers)
            whole = whole.reshape(self._channel.size * size, columns)
        if whole is None or by_rows is None:
            found = by_rows if whole is None else whole
            assert found is not None
            return found
        own, before = self._columns[self._channel.rank], self._before_rows
        first, last = whole.split([before, own - before], dim=1)
        return torch.cat([first, by_rows, last], dim=1)

    def _sizes(self, size: int) -> tuple[list[int], list[int]]:
        """Numbers that this rank sends to every rank for the examples of one peer, and that it receives from each, on
        the way forward."""
        of_peer = size // self._peers
        columns = self._columns[self._channel.rank]
        return [of_peer * columns] * self._channel.size, [of_peer * width for width in self._columns]

    def _parts(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of whole rows, and those of tables split by rows, which lie together."""
        if not self._row_columns or not any(self._columns):
            return pooled, pooled
        own, before = self._columns[self._channel.rank], self._before_rows
        first, by_rows, last = pooled.split([before, self._row_columns, own - before], dim=1)
        return torch.cat([first, last], dim=1), by_rows

    def _by_rank(self, pooled: Tensor, size: int) -> Tensor:
        """Rows in the order of the global batch -> by the rank whose examples they are."""
        if self._peers == 1:
            return pooled
        peers, ranks = self._peers, self._channel.size
        return pooled.reshape(peers, ranks, size // peers, pooled.shape[1]).transpose(0, 1)

    def _in_batch_order(self, gradient: Tensor, size: int) -> Tensor:
        """The reverse of `_by_rank`."""
        if self._peers == 1:
            return gradient
        peers, ranks = self._peers, self._channel.size
        return gradient.view(ranks, peers, size // peers, gradient.shape[1]).transpose(0, 1).reshape(gradient.shape)


def _routes(
    layout: EmbeddingLayout, shards: Sequence[Shard], config: EmbeddingConfig, ranks: int, device: torch.device
) -> LookupPlan:
    """Who looks up what of tables that are spread over a group."""
    by_table = {table: [s for s in shards if s.table == table] for table in {s.table for s in shards}}
    backends = {table: requested_backend(own, config, device.type).backend for table, own in by_table.items()}
    fused, triton = ([t for t, backend in backends.items() if backend == kind] for kind in ("fbgemm", "triton"))
    return plan_lookups(layout, shards, ranks, fused, triton)


def _spread(shards: Sequence[Shard], rank: int) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
    """The shards of tables that are spread over a group, and those of replicated ones that a rank has."""
    names = replicated(shards)
    spread = tuple(shard for shard in shards if shard.table not in names)
    return spread, tuple(shard for shard in shards if shard.table in names and shard.rank == rank)


def column_blocks(
    layout: EmbeddingLayout,
    shards: Sequence[Shard],
    config: EmbeddingConfig,
    ranks: int,
    rank: int,
    device: torch.device,
) -> list[list[ColumnBlock]]:
    """What lies where in the blocks that a rank of a group has of its examples (`TableGroup.blocks`): the columns that
    every rank of the group sends to it, the sums of tables split by rows, and the columns of replicated tables.

    Args:
        shards: of the group's tables; their ranks are places in the group.
        ranks: of the group.
    """
    spread, own = _spread(shards, rank)
    senders: list[list[Lookup]] = []
    if spread:
        slots = _routes(layout, spread, config, ranks, device).slots
        whole = [[slot for slot in of_rank if not slot.by_rows] for of_rank in slots]
        by_rows = [slot for slot in slots[rank] if slot.by_rows]
        senders += [*(whole if any(whole) else []), *([by_rows] if by_rows else [])]
    if own:
        senders.append(list(plan_lookups(layout, own, ranks).slots[rank]))
    return [[ColumnBlock(s.feature.name, s.start, s.offset, s.columns) for s in slots] for slots in senders]


@dataclass(frozen=True)
class Distributed:
    """A batch whose ids have reached their owners.

    Attributes:
        ids: of the examples whose embeddings are assembled: this rank's own, or what its tower modules take in.
        size: how many examples those are.
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
        peers: of how many equal blocks, in the order of the global batch, the examples of a rank consist: one for each
            peer that handed them over.

    Attributes:
        layout: of the group's features.
        tables: this rank's, those that are spread over the group before the replicated ones.
        wire: the type of the gradient of `blocks`: that of its message, as it only travels; with replicated tables,
            whose gradients are summed, float32.
    """

    def __init__(
        self,
        layout: EmbeddingLayout,
        shards: tuple[Shard, ...],
        config: EmbeddingConfig,
        channel: Channel,
        *,
        peers: int,
        messages: WireDtypes,
        device: torch.device,
    ) -> None:
        self.layout, self._device, self._peers = layout, device, peers
        self.choices = choose_backends(layout, shards, config, device)
        spread, own = _spread(shards, channel.rank)
        self._sharded = self._replicated = None
        if spread:
            self._sharded = ShardedTables(
                layout, spread, self.choices, config, channel, peers=peers, messages=messages, device=device
            )
        if own:
            self._replicated = ReplicatedTables(layout, own, self.choices, config, channel, device)
        travels = self._sharded is not None and self._replicated is None
        self.wire = self._sharded.messages.backward if self._sharded is not None and travels else torch.float32
        parts = [part for part in (self._sharded, self._replicated) if part is not None]
        self.tables: tuple[LocalTables, ...] = tuple(part.tables for part in parts)
        pieces = column_blocks(layout, shards, config, channel.size, channel.rank, device)
        self._assembly = Regroup(pieces, device, mean_features(layout))

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
        blocks = self.blocks(batch, size, by_peer=False)
        values = self._assembly.assemble(blocks.values.view(-1), divisors, size, dtype)
        return Exchanged(
            values,
            lambda gradient: self._assembly.scatter(gradient, divisors, size, self.wire, divide),
            lambda gradient: blocks.update(gradient.view(blocks.values.shape)),
        )

    def blocks(self, batch: Distributed, size: int, by_peer: bool) -> Pooled:
        """The blocks of embeddings of this rank's examples (see `column_blocks`), sums where a mean is wanted;
        collective, as is the update.

        Args:
            size: how many examples.
            by_peer: whether the blocks of each peer's examples lie together: [peers, blocks of its examples]; else
                [1, blocks of all examples], and in a block the examples of all peers.
        """
        parts = []
        if self._sharded is not None:
            assert batch.local is not None
            parts.append(self._sharded.pool(batch.local, size, by_peer))
        if self._replicated is not None:
            assert batch.replicated is not None
            parts.append(self._replicated.pool(batch.replicated, self._peers if by_peer else 1))
        widths = [part.values.shape[1] for part in parts]

        def update(gradient: Tensor) -> None:
            for part, own in zip(parts, gradient.split(widths, dim=1), strict=True):
                part.update(own)

        if not parts:  # nothing but numeric features: [B, 0], with a way back that leads nowhere
            return Pooled(torch.empty(self._peers if by_peer else 1, 0, device=self._device), lambda gradient: None)
        return Pooled(parts[0].values if len(parts) == 1 else torch.cat([p.values for p in parts], dim=1), update)


def mean_features(layout: EmbeddingLayout) -> list[str]:
    """Whose sums become means."""
    return [f.name for f in layout.features if f.multi_valued and f.pooling == "mean"]
