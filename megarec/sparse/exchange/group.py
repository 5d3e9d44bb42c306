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
from megarec.distributed.collectives import Channel, WireDtypes
from megarec.sparse.exchange.parts import columns_of, joined, rows_of
from megarec.sparse.exchange.regroup import Regroup
from megarec.sparse.exchange.sharded import ReplicatedTables, ShardedLookup, ShardedTables
from megarec.sparse.exchange.unpooled import GroupRows
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.placement import Shard
from megarec.sparse.tables.base import LocalIds, Pooled, Unpooled
from megarec.sparse.tables.local import LocalTables, choose_backends, split_replicated


@dataclass(frozen=True)
class Distributed:
    """A batch whose ids have reached their owners.

    Attributes:
        ids: of this rank's own examples.
        size: B, how many examples those are.
        local: what this rank looks up in tables that are spread over the group; None: there are none.
        replicated: what it looks up in replicated tables; None: there are none.
        own: ids of this rank's examples alone, where `ids` are those of its peers' as well.
        peers: the rows of sequences between hosts; None: there are none.
    """

    ids: Mapping[str, Ids]
    size: int
    local: LocalIds | None
    replicated: LocalIds | None
    own: Mapping[str, Ids] | None = None
    peers: Unpooled | None = None


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

    def rows(self, batch: Distributed) -> GroupRows:
        """Look up the rows of sequences and start them on their way; collective."""
        held = ((self._sharded, batch.local), (self._replicated, batch.replicated))
        return GroupRows([(p.tables, p.row_exchange, ids) for p, ids in held if p is not None and ids is not None])

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
