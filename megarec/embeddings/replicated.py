"""Tables that every rank of a group holds whole: no ids and no embeddings travel."""

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
from megarec.embeddings.routes import build_routes
from megarec.embeddings.tables import Choice
from megarec.parallel.collectives import Channel, Ledger


class ReplicatedTables:
    """This rank's copies.

    Args:
        shards: this rank's.
        channel: whose ranks hold the other copies.

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
        slots = build_routes(layout, shards, channel.size, fused=()).slots[channel.rank]
        alone = Channel(channel.name, None, 0, 1, Ledger())
        self._ids = IdExchange([[slot.feature for slot in slots]], alone, torch.int64, device)
        self.tables = LocalTables(slots, layout, shards, choices, config, channel, device, copies=True)
        self.pieces = [[Piece(slot.feature.name, slot.start, slot.offset, slot.columns) for slot in slots]]

    def distribute(self, ids: Mapping[str, Ids], size: int) -> LocalIds:
        """Ids of `size` examples by feature -> what is looked up in the copies."""
        return self._ids(ids, size)

    def pool(self, local: LocalIds) -> Tensor:
        """float32 [size, columns of all slots]."""
        return self.tables.forward(local)
