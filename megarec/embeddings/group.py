"""Tables spread over one group of ranks: ids to the owners, lookup, pooled embeddings back.

    whole rows, columns    ids --all-to-all--> owner: lookup --all-to-all--> the rank whose examples they are
    rows split             ids --all-to-all--> owners of their rows: partial sums --reduce-scatter--> that rank
    copies                 lookup on the spot; the gradients are summed over the group before one update of all copies

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
from megarec.embeddings.assembly import Assembly
from megarec.embeddings.ids import LocalIds
from megarec.embeddings.layout import EmbeddingLayout
from megarec.embeddings.local import AllTables
from megarec.embeddings.placement import Shard, replicated
from megarec.embeddings.replicated import ReplicatedTables
from megarec.embeddings.sharded import ShardedTables
from megarec.embeddings.tables import choose_backends
from megarec.parallel.collectives import Channel, Messages


@dataclass(frozen=True)
class Distributed:
    """A batch whose ids have reached their owners.

    Attributes:
        ids: of this rank's own examples.
        size: B, how many examples those are.
        local: what this rank looks up in tables that are spread over the group; None: there are none.
        copied: what it looks up in its copies; None: there are none.
    """

    ids: Mapping[str, Ids]
    size: int
    local: LocalIds | None
    copied: LocalIds | None


class TableGroup:
    """The tables of a group and this rank's part of them.

    Args:
        layout: of the group's features.
        shards: of the group's tables; their ranks are places in the channel.
        blocks: of how many equal blocks, in the order of the global batch, the examples of a rank consist: one for
            each peer that handed them over.

    Attributes:
        layout: of the group's features.
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
        self.layout = layout
        self.choices = choose_backends(layout, shards, config, device)
        copied = replicated(shards)
        spread = tuple(shard for shard in shards if shard.table not in copied)
        copies = tuple(s for s in shards if s.table in copied and s.rank == channel.rank)
        self._sharded = self._copied = None
        if spread:
            self._sharded = ShardedTables(
                layout, spread, self.choices, config, channel, blocks=blocks, messages=messages, device=device
            )
        if copies:
            self._copied = ReplicatedTables(layout, copies, self.choices, config, channel, device)
        parts = [part for part in (self._sharded, self._copied) if part is not None]
        self.tables = AllTables([part.tables for part in parts])
        self._assembly = Assembly(
            [block for part in parts for block in part.pieces],
            [f.name for f in layout.features if f.multi_valued and f.pooling == "mean"],
        )

    def distribute(self, batch: Batch) -> Distributed:
        """Send the ids of a batch to the owners; reads no table."""
        return self.distribute_ids(batch.ids, batch.size)

    def distribute_ids(self, ids: Mapping[str, Ids], size: int) -> Distributed:
        """`distribute`, of B examples given by feature."""
        local = None if self._sharded is None else self._sharded.distribute(ids, size)
        copied = None if self._copied is None else self._copied.distribute(ids, size)
        return Distributed(ids, size, local, copied)

    def pool(self, batch: Distributed) -> Tensor:
        """Pooled embeddings of this rank's examples, float32 [B, width of the group's features] in layout order."""
        blocks = []
        if self._sharded is not None:
            assert batch.local is not None
            blocks += self._sharded.pool(batch.local, batch.size)
        if self._copied is not None:
            assert batch.copied is not None
            blocks.append(self._copied.pool(batch.copied))
        flat = blocks[0] if len(blocks) == 1 else torch.cat([block.reshape(-1) for block in blocks])
        return self._assembly(flat.reshape(-1), batch.ids, batch.size)
