"""Tables spread over one group of ranks: ids to the owners, lookup, pooled embeddings back.

    examples of the r-th rank --ids, all-to-all--> owners of the tables: [all examples, columns of the owner]
    [B, width] in layout order <--pooled embeddings, all-to-all-- the rows of a rank's examples go back to it

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
from megarec.embeddings.assembly import Assembly, Piece
from megarec.embeddings.ids import IdExchange, LocalIds
from megarec.embeddings.layout import EmbeddingLayout
from megarec.embeddings.local import LocalTables
from megarec.embeddings.placement import Shard
from megarec.embeddings.routes import build_routes
from megarec.embeddings.tables import choose_backends, wished_backend
from megarec.parallel.collectives import Channel, Messages, all_to_all_with_grad


@dataclass(frozen=True)
class Distributed:
    """A batch whose ids have reached their owners.

    Attributes:
        ids: of this rank's own examples.
        size: B, how many examples those are.
        local: what this rank looks up.
    """

    ids: Mapping[str, Ids]
    size: int
    local: LocalIds


class TableGroup:
    """The tables of a group and this rank's part of them.

    Args:
        layout: of the group's features.
        shards: of the group's tables; their ranks are places in the channel.
        blocks: of how many equal blocks, in the order of the global batch, the examples of a rank consist: one for
            each peer that handed them over.
    """

    def __init__(
        self,
        layout: EmbeddingLayout,
        shards: tuple[Shard, ...],
        config: EmbeddingConfig,
        channel: Channel,
        *,
        blocks: int,
        messages: Messages,
        device: torch.device,
    ) -> None:
        self._channel, self._blocks, self._messages = channel, blocks, messages
        self.choices = choose_backends(layout, shards, config, device)
        by_table = {table.name: [s for s in shards if s.table == table.name] for table in layout.tables}
        fused = {t for t, own in by_table.items() if wished_backend(own, config).backend == "fbgemm"}
        routes = build_routes(layout, shards, channel.size, fused)
        features = [[slot.feature for slot in slots] for slots in routes.slots]
        self._ids = IdExchange(features, channel, routes.index_dtype, device, blocks)
        self.tables = LocalTables(routes.slots[channel.rank], layout, shards, self.choices, config, channel, device)
        self._assembly = Assembly(
            [[Piece(s.feature.name, s.start, s.offset, s.columns) for s in slots] for slots in routes.slots],
            [f.name for f in layout.features if f.multi_valued and f.pooling == "mean"],
        )
        self._columns = [routes.columns(owner) for owner in range(channel.size)]

    def distribute(self, batch: Batch) -> Distributed:
        """Send the ids of a batch to the owners; reads no table."""
        return self.distribute_ids(batch.ids, batch.size)

    def distribute_ids(self, ids: Mapping[str, Ids], size: int) -> Distributed:
        """`distribute`, of B examples given by feature."""
        return Distributed(ids, size, self._ids(ids, size))

    def pool(self, batch: Distributed) -> Tensor:
        """Pooled embeddings of this rank's examples, float32 [B, width of the group's features] in layout order."""
        pooled = self.tables.forward(batch.local)
        size, ranks = batch.size, self._channel.size
        columns = self._columns[self._channel.rank]
        if self._blocks > 1:  # [blocks, ranks, ...] -> by rank
            pooled = pooled.view(self._blocks, ranks, size // self._blocks, columns).transpose(0, 1)
        blocks = all_to_all_with_grad(
            pooled.reshape(-1),
            [size * width for width in self._columns],
            [size * columns] * ranks,
            self._channel,
            "embeddings",
            self._messages,
        )
        return self._assembly(blocks, batch.ids, size)
