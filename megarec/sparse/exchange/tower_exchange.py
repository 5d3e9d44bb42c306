"""The tower exchange: SPTT of DMT (arXiv 2403.00877) in two hops, no collective over all ranks.

Rank (t, q) is local rank q of host t; H hosts, B examples a rank:

    a. ids over the peer group: (t, q) receives the ids of host t's features for the H B examples of its peers
    b. inside the host (group.py): ids to table owners, pooled embeddings back: [H B, columns of host t]
    c. what the host's towers make of them: [H B, outputs of host t]
    d. over the peer group: (t, q) receives what every host made of its own examples: [B, outputs of all]

Without tower modules nothing is assembled in the middle: the blocks that b brings for the examples of a peer lie
together, and d sends them on as they are.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch
from megarec.distributed.collectives import FP32, Channel, WireDtypes, all_to_all
from megarec.distributed.topology import Topology
from megarec.sparse.exchange.group import Distributed, Exchanged, TableGroup, column_blocks, mean_features
from megarec.sparse.exchange.ids import IdExchange
from megarec.sparse.exchange.regroup import ColumnBlock, Regroup, Scattered
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.placement import Shard

Back = Callable[[Tensor], Tensor]
Change = Callable[[Tensor], tuple[Tensor, Back]]
"""What happens to embeddings on their way, and to their gradient on its way back."""


class TowerExchange:
    """Tables and exchange of one rank.

    Args:
        hosts: by host, the layout of the features of its towers (see `host_layouts`).
        shards: of this host's tables; their ranks are local ranks.
        outputs: columns that each host hands on for an example.
        assembly: turns what the hosts hand on into one matrix.
        through: whether tower modules stand in the middle: then `pool_through`, else `pool`.
    """

    def __init__(
        self,
        hosts: Sequence[EmbeddingLayout],
        shards: tuple[Shard, ...],
        config: EmbeddingConfig,
        *,
        tower: Channel,
        peer: Channel,
        outputs: Sequence[int],
        assembly: Regroup,
        through: bool,
        messages: WireDtypes,
        device: torch.device,
    ) -> None:
        self._peer, self._outputs, self._assembly, self._through = peer, outputs, assembly, through
        self._messages = messages if peer.size > 1 else FP32
        self._features = hosts[peer.rank].features
        small = all(table.rows < 2**31 for layout in hosts for table in layout.tables)
        dtype = torch.int32 if small and tower.size * peer.size > 1 else torch.int64
        self._ids = IdExchange([layout.features for layout in hosts], peer, dtype, device)
        self.group = TableGroup(
            hosts[peer.rank], shards, config, tower, peers=peer.size, messages=messages, device=device
        )

    def distribute(self, batch: Batch) -> Distributed:
        """Hop a and the ids of hop b; reads no table."""
        arrived = self._ids(batch.ids, batch.size)
        ids = {f.name: arrived.of_slot(slot, f) for slot, f in enumerate(self._features)}
        there = self.group.distribute_ids(ids, batch.size * self._peer.size)
        return there if self._through else dataclasses.replace(there, ids=batch.ids, size=batch.size)

    def pool(self, batch: Distributed, dtype: torch.dtype = torch.float32, divide: int = 1) -> Exchanged:
        """The rest of hop b, and d: the owners' blocks travel on as they lie, and are assembled at the end.

        Args:
            dtype: of the result, [B, columns of all hosts].
            divide: what the gradient is divided by besides.
        """
        assert not self._through
        peers, size, divisors = self._peer.size, batch.size, self._assembly.divisors(batch.ids)
        received, sent = self._sizes(size)
        inner = self.group.blocks(batch, size * peers, by_peer=True)
        message, wire = inner.values.view(-1), self.group.wire
        if peers > 1:
            message, wire = message.to(self._messages.forward), self._messages.backward
        blocks = all_to_all(message, received, sent, self._peer, "towers")

        def update(gradient: Tensor) -> None:
            arrived = all_to_all(gradient, sent, received, self._peer, "towers", "backward")
            inner.update(arrived.view(inner.values.shape))

        return Exchanged(
            self._assembly.assemble(blocks, divisors, size, dtype),
            lambda gradient: self._assembly.scatter(gradient, divisors, size, wire, divide),
            update,
        )

    def pool_through(
        self, batch: Distributed, towers: Change, dtype: torch.dtype = torch.float32, divide: int = 1
    ) -> Exchanged:
        """The rest of hop b, then c and d: [B, outputs of all hosts]; collective, and so is `scatter` of the result.

        Args:
            towers: [H B, columns of this host, tower after tower] -> [H B, outputs of this host].
            dtype: of the result.
            divide: what the gradient is divided by besides.
        """
        assert self._through
        inner = self.group.pool(batch)
        made, back = towers(inner.values)
        size = batch.size // self._peer.size
        received, sent = self._sizes(size)
        message = made.detach().reshape(-1).to(self._messages.forward)
        blocks = all_to_all(message, received, sent, self._peer, "towers")

        def scatter(gradient: Tensor) -> Scattered:
            gradient, total = self._assembly.scatter(gradient, None, size, self._messages.backward, divide)
            arrived = all_to_all(gradient, sent, received, self._peer, "towers", "backward")
            return Scattered(inner.scatter(back(arrived.view(batch.size, -1))).blocks, total)

        return Exchanged(self._assembly.assemble(blocks, None, size, dtype), scatter, inner.update)

    def _sizes(self, size: int) -> tuple[list[int], list[int]]:
        """Numbers that this rank receives from every peer, and that it sends to each, on the way forward."""
        return [size * columns for columns in self._outputs], [size * self._outputs[self._peer.rank]] * self._peer.size


def host_layouts(layout: EmbeddingLayout, towers: Sequence[Sequence[str]], hosts: int) -> list[EmbeddingLayout]:
    """The part of a layout that each host holds: tower t on host t // (T / H), its features tower after tower.

    Args:
        towers: T groups of feature names, T a multiple of `hosts`; features that share a table are in one tower.
    """
    by_name = {feature.name: feature for feature in layout.features}
    per_host = len(towers) // hosts
    parts = []
    for host in range(hosts):
        features, start = [], 0
        for name in (name for tower in towers[host * per_host : (host + 1) * per_host] for name in tower):
            features.append(dataclasses.replace(by_name[name], start=start))
            start += by_name[name].columns
        held = {feature.table for feature in features}
        tables = tuple(table for table in layout.tables if table.name in held)
        parts.append(EmbeddingLayout(layout.dim, tables, tuple(features), full_embeddings=0, small_columns=start))
    return parts


def canonical_assembly(
    layout: EmbeddingLayout,
    hosts: Sequence[EmbeddingLayout],
    shards: Sequence[Shard],
    config: EmbeddingConfig,
    topology: Topology,
    device: torch.device,
) -> Regroup:
    """For embeddings that no tower module changed: every column of the owners' blocks to its place in the whole layout.

    Args:
        shards: of all hosts' tables; their ranks are those of the whole job.
    """
    whole = {feature.name: feature.start for feature in layout.features}
    local, pieces = topology.ranks_per_host, []
    for host, part in enumerate(hosts):
        inside = {feature.name: feature.start for feature in part.features}
        first = host * local
        held = [dataclasses.replace(s, rank=s.rank - first) for s in shards if first <= s.rank < first + local]
        for block in column_blocks(part, held, config, local, topology.rank % local, device):
            pieces.append([dataclasses.replace(p, start=whole[p.feature] + p.start - inside[p.feature]) for p in block])
    return Regroup(pieces, device, mean_features(layout))


def tower_order_assembly(outputs: Sequence[int], device: torch.device) -> Regroup:
    """For outputs of tower modules: host after host."""
    starts = [sum(outputs[:host]) for host in range(len(outputs))]
    pieces = [[ColumnBlock(f"host {host}", starts[host], 0, columns)] for host, columns in enumerate(outputs)]
    return Regroup(pieces, device)
