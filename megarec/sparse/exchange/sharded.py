"""The tables of one rank of a group: those that every rank holds whole, and those that are spread over the ranks.

What rows of them travel one by one, those of sequences, unpooled.py exchanges.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Ids
from megarec.distributed.collectives import FP32, Channel, Ledger, WireDtypes, all_to_all_into
from megarec.sparse.exchange.ids import IdExchange, RowSplitter
from megarec.sparse.exchange.parts import PartedExchange, joined, rows_of
from megarec.sparse.exchange.regroup import ColumnBlock, gradient_for_owners, sum_over_owners
from megarec.sparse.exchange.unpooled import LocalRows, RowExchange, row_pieces
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.lookups import Lookup, plan_lookups
from megarec.sparse.placement import Shard
from megarec.sparse.tables.base import LocalIds, Pooled
from megarec.sparse.tables.local import Choice, LocalTables, routes_of


class ReplicatedTables:
    """Tables that every rank of a group holds whole: no ids and no embeddings travel.

    Args:
        shards: this rank's.
        channel: whose ranks hold the same tables.

    Attributes:
        pieces: what lies where in the block that `pool` returns.
        row_exchange: of the rows of sequences, which stay here.
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
        slots, unpooled = plan.slots[channel.rank], plan.unpooled[channel.rank]
        alone = Channel(channel.name, None, 0, 1, Ledger())
        self.ids = IdExchange([plan.sources[channel.rank]], alone, plan.index_dtype, device)
        self.tables = LocalTables(plan, layout, shards, choices, config, channel, device, replicated=True)
        self._rows = LocalRows(len(slots), [[slot.source.name for slot in unpooled]])
        self.row_exchange = RowExchange([row_pieces(unpooled)], alone, "sequences", FP32)
        self.pieces = [[ColumnBlock(slot.feature.name, slot.start, slot.offset, slot.columns) for slot in slots]]

    def distribute(self, ids: Mapping[str, Ids], size: int) -> LocalIds:
        """Ids of `size` examples by feature -> what is looked up in them."""
        return self._rows.apart(self.ids(ids, size), ids, {})

    def pool(self, local: LocalIds) -> Pooled:
        """[size, columns of all slots]."""
        return self.tables.pool(local)


class ShardedTables:
    """This rank's part of the tables; see TableGroup for the arguments.

    Attributes:
        pieces: what lies where in the blocks that `pool` returns: those of every rank, then the sum of those split by
            rows.
        messages: the types in which embeddings and their gradients travel; with one rank, nothing does.
        row_exchange: of the rows of sequences.
        nothing: no numbers.
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
        self._channel, self._blocks, self._device = channel, blocks, device
        self.nothing = torch.empty(0, device=device)
        self.messages = messages if channel.size > 1 else FP32
        routes = routes_of(layout, shards, config, channel.size, device)
        every = [(*own, *unpooled) for own, unpooled in zip(routes.slots, routes.unpooled, strict=True)]
        self._split = RowSplitter(every, device)
        self.ids = IdExchange(routes.sources, channel, routes.index_dtype, device, blocks)
        mine = routes.slots[channel.rank]
        emitted = self.messages.forward
        self.tables = LocalTables(routes, layout, shards, choices, config, channel, device, output=emitted)
        unpooled_sources = [[slot.source.name for slot in slots] for slots in routes.unpooled]
        self._rows = LocalRows(len(mine), unpooled_sources, blocks)
        pieces = [row_pieces(slots) for slots in routes.unpooled]
        self.row_exchange = RowExchange(pieces, channel, "sequences", self.messages)

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
        split, orders = self._split(ids, size)
        return self._rows.apart(self.ids(split, size), split, orders)

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
        return self._together(whole, by_rows, size)

    def _together(self, whole: Tensor | None, by_rows: Tensor | None, size: int) -> Tensor:
        """Both kinds of columns in the order of the slots; none where only sequences look up these tables."""
        if whole is None or by_rows is None:
            found = by_rows if whole is None else whole
            return torch.empty(self._channel.size * size, 0, device=self._device) if found is None else found
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
            pooled.update(self._together(own, by_rows, size))

        if not blocks:
            return Pooled(pooled.values.new_empty(peers, 0), update)
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
        if not blocks:
            return self._tables.nothing
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
