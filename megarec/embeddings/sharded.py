"""Tables of which every row or column lies on one rank of a group: ids to the owners, lookup, embeddings back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Ids
from megarec.embeddings.assembly import Piece
from megarec.embeddings.ids import IdExchange, LocalIds
from megarec.embeddings.layout import EmbeddingLayout
from megarec.embeddings.local import LocalTables
from megarec.embeddings.placement import Shard
from megarec.embeddings.routes import Slot, build_routes
from megarec.embeddings.row_wise import RowSplitter, sum_over_owners
from megarec.embeddings.tables import Choice, wished_backend
from megarec.parallel.collectives import Channel, Messages, all_to_all_with_grad


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
        messages: Messages,
        device: torch.device,
    ) -> None:
        self._channel, self._blocks, self._messages = channel, blocks, messages
        by_table = {table: [s for s in shards if s.table == table] for table in {s.table for s in shards}}
        fused = {table for table, own in by_table.items() if wished_backend(own, config).backend == "fbgemm"}
        routes = build_routes(layout, shards, channel.size, fused)
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
        self.pieces = [[_piece(slot) for slot in slots] for slots in senders]

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


def _piece(slot: Slot) -> Piece:
    return Piece(slot.feature.name, slot.start, slot.offset, slot.columns)
