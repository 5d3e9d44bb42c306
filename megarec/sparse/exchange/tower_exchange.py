"""The tower exchange: SPTT of DMT (arXiv 2403.00877) in two hops, no collective over all ranks.

Rank (t, q) is local rank q of host t; H hosts, B examples a rank:

    a. ids over the peer group: (t, q) receives the ids of host t's features for the H B examples of its peers
    b. inside the host (group.py): ids to table owners, pooled embeddings back: [H B, columns of host t]
    c. what the host's towers make of them: [H B, outputs of host t]
    d. over the peer group: (t, q) receives what every host made of its own examples: [B, outputs of all]
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch
from megarec.distributed.collectives import FP32, Channel, WireDtypes, all_to_all
from megarec.sparse.exchange.group import Distributed, Exchanged, TableGroup
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
        assembly: turns the hosts' blocks [sum over hosts of B x outputs] into one matrix.
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
        messages: WireDtypes,
        device: torch.device,
    ) -> None:
        self._peer, self._outputs, self._assembly = peer, outputs, assembly
        self._messages = messages if peer.size > 1 else FP32
        self._features = hosts[peer.rank].features
        small = all(table.rows < 2**31 for layout in hosts for table in layout.tables)
        dtype = torch.int32 if small and tower.size * peer.size > 1 else torch.int64
        self._ids = IdExchange([layout.features for layout in hosts], peer, dtype, device)
        self.group = TableGroup(
            hosts[peer.rank], shards, config, tower, blocks=peer.size, messages=messages, device=device
        )

    @property
    def id_order(self) -> list[str]:
        """See `IdExchange.order`: of hop a."""
        return self._ids.order

    def distribute(self, batch: Batch) -> Distributed:
        """Hop a and the ids of hop b; reads no table."""
        arrived = self._ids(batch.ids, batch.size)
        ids = {f.name: arrived.of_slot(slot, f) for slot, f in enumerate(self._features)}
        return self.group.distribute_ids(ids, batch.size * self._peer.size)

    def pool(
        self, batch: Distributed, towers: Change, dtype: torch.dtype = torch.float32, divide: int = 1
    ) -> Exchanged:
        """The rest of hop b, then c and d: [B, outputs of all hosts]; collective, and so is `scatter` of the result.

        Args:
            towers: [H B, columns of this host, tower after tower] -> [H B, outputs of this host].
            dtype: of the result.
            divide: what the gradient is divided by besides.
        """
        inner = self.group.pool(batch)
        made, back = towers(inner.values)
        size, own = batch.size // self._peer.size, self._outputs[self._peer.rank]
        received = [size * columns for columns in self._outputs]
        sent = [size * own] * self._peer.size
        message = made.detach().reshape(-1).to(self._messages.forward)
        blocks = all_to_all(message, received, sent, self._peer, "towers")

        def scatter(gradient: Tensor) -> Scattered:
            gradient, total = self._assembly.scatter(gradient, None, size, self._messages.backward, divide)
            arrived = all_to_all(gradient, sent, received, self._peer, "towers", "backward")
            return Scattered(inner.scatter(back(arrived.view(batch.size, own))).blocks, total)

        return Exchanged(self._assembly.assemble(blocks, None, size, dtype), scatter, inner.update)


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


def canonical_assembly(layout: EmbeddingLayout, hosts: Sequence[EmbeddingLayout], device: torch.device) -> Regroup:
    """For embeddings that no tower module changed: every feature to its columns of the whole layout."""
    start = {feature.name: feature.start for feature in layout.features}
    pieces = [[ColumnBlock(f.name, start[f.name], f.start, f.columns) for f in part.features] for part in hosts]
    return Regroup(pieces, device)


def tower_order_assembly(outputs: Sequence[int], device: torch.device) -> Regroup:
    """For outputs of tower modules: host after host."""
    starts = [sum(outputs[:host]) for host in range(len(outputs))]
    pieces = [[ColumnBlock(f"host {host}", starts[host], 0, columns)] for host, columns in enumerate(outputs)]
    return Regroup(pieces, device)
