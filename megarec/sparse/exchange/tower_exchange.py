"""The tower exchange: SPTT of DMT (arXiv 2403.00877) in two hops, no collective over all ranks.

Rank (t, q) is local rank q of host t; H hosts, B examples a rank:

    a. ids over the peer group: (t, q) receives the ids of host t's features for the H B examples of its peers
    b. inside the host (group.py): ids to table owners, pooled embeddings back: [H B, columns of host t]
    c. what the host's towers make of them: [H B, outputs of host t]
    d. over the peer group: (t, q) receives what every host made of its own examples: [B, outputs of all]

Without tower modules nothing is assembled between b and d (direct.py).
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch
from megarec.distributed.collectives import FP32, Channel, WireDtypes
from megarec.sparse.exchange.direct import DirectLookup
from megarec.sparse.exchange.group import Distributed, Exchanged, TableGroup
from megarec.sparse.exchange.ids import IdExchange
from megarec.sparse.exchange.parts import PartedExchange
from megarec.sparse.exchange.regroup import ColumnBlock, Regroup
from megarec.sparse.exchange.unpooled import LocalRows, RowExchange, RowPiece, TowerRows
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
        sections: where no tower modules stand in the middle, the columns of each of the owners' blocks of which the
            block of this host consists (direct.py).
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
        sections: Sequence[int],
        messages: WireDtypes,
        device: torch.device,
    ) -> None:
        self._peer, self._outputs, self._assembly, self._sections = peer, outputs, assembly, sections
        self._messages = messages if peer.size > 1 else FP32
        self._features, self._unpooled = hosts[peer.rank].looked_up, [f.name for f in hosts[peer.rank].unpooled]
        small = all(table.rows < 2**31 for layout in hosts for table in layout.tables)
        dtype = torch.int32 if small else torch.int64
        self._ids = IdExchange([layout.looked_up for layout in hosts], peer, dtype, device)
        names = [[feature.name for feature in layout.unpooled] for layout in hosts]
        self._rows = LocalRows(len(hosts[peer.rank].features), names)
        pieces = [[RowPiece(f.name, f.name, 0, f.columns) for f in layout.unpooled] for layout in hosts]
        self._row_exchange = RowExchange(pieces, peer, "sequences", self._messages)
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
        there = self.group.distribute_ids(ids, batch.size * self._peer.size)
        rows = self._rows.apart(arrived, batch.ids, {}).unpooled
        return dataclasses.replace(there, own=batch.ids, peers=rows)

    def rows(self, batch: Distributed) -> TowerRows:
        """The rows of sequences, of all hosts; collective."""
        assert batch.peers is not None
        return TowerRows(self.group.rows(batch), self._unpooled, self._row_exchange, batch.peers)

    def pool_direct(
        self, batch: Distributed, dtype: torch.dtype = torch.float32, divide: int = 1, parts: int = 1
    ) -> Exchanged:
        """The rest of hop b, and d, without assembly in the middle: [B, columns of all hosts]; collective.

        Args:
            dtype: of the result.
            divide: what the gradient is divided by besides.
            parts: in how many parts hop d travels, while others compute; divides B.
        """
        assert batch.own is not None
        inner, size = self.group.by_peer(batch), batch.size // self._peer.size
        messages = self._messages
        if self._peer.size == 1:  # nothing travels, and the gradient may take the type of the messages of hop b
            messages = WireDtypes(inner.values.dtype, self.group.wire)
        peers = PartedExchange(
            inner.values.reshape(-1), [size * columns for columns in self._sections],
            [size * columns for columns in self._outputs], self._peer, "towers", messages, parts,
        )  # fmt: skip
        divisors = self._assembly.divisors(batch.own)
        return DirectLookup(inner, peers, self._assembly, divisors, size // parts, dtype, divide)

    def pool(
        self,
        batch: Distributed,
        towers: Change,
        dtype: torch.dtype = torch.float32,
        divide: int = 1,
        parts: int = 1,
    ) -> Exchanged:
        """The rest of hop b, then c and d: [B, outputs of all hosts]; collective.

        Args:
            towers: [H B, columns of this host, tower after tower] -> [H B, outputs of this host].
            dtype: of the result.
            divide: what the gradient is divided by besides.
            parts: in how many parts hop d travels, while others compute; divides B.
        """
        inner = self.group.pool(batch)
        made, back = towers(inner.arrive(0))
        size, own = batch.size // self._peer.size, self._outputs[self._peer.rank]
        peers = PartedExchange(
            made.detach().reshape(-1),
            [size * own],
            [size * columns for columns in self._outputs],
            self._peer,
            "towers",
            self._messages,
            parts,
        )
        return TowerLookup(inner, back, peers, self._assembly, size // parts, (batch.size, own), dtype, divide)


class TowerLookup:
    """An `Exchanged` of the tower exchange: hop d by parts; hops b and c, inside the host, for all of them at once.

    Args:
        back: the gradient of what the towers made -> that of what they took in.
        assembly: see TowerExchange.
        size: examples of a part.
        made: shape of what the towers made.
    """

    def __init__(
        self,
        inner: Exchanged,
        back: Back,
        peers: PartedExchange,
        assembly: Regroup,
        size: int,
        made: tuple[int, int],
        dtype: torch.dtype,
        divide: int,
    ) -> None:
        self._inner, self._back, self._peers, self._assembly = inner, back, peers, assembly
        self._size, self._made, self._dtype, self._divide = size, made, dtype, divide

    def arrive(self, part: int) -> Tensor:
        return self._assembly.assemble(self._peers.arrive(part), None, self._size, self._dtype)

    def leave(self, part: int, gradient: Tensor) -> Tensor | None:
        wire = self._peers.messages.backward
        blocks, total = self._assembly.scatter(gradient, None, self._size, wire, self._divide)
        self._peers.leave(blocks)
        if part + 1 == self._peers.parts:
            self._inner.leave(0, self._back(self._peers.gradient().view(self._made)))
        return total

    def update(self) -> None:
        self._inner.update()

    def forget(self) -> None:
        self._inner.forget()


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
        names = [name for tower in towers[host * per_host : (host + 1) * per_host] for name in tower]
        for name in names:
            if name in by_name:
                features.append(dataclasses.replace(by_name[name], start=start))
                start += by_name[name].columns
        unpooled = tuple(feature for feature in layout.unpooled if feature.name in names)
        held = {feature.table for feature in (*features, *unpooled)}
        tables = tuple(table for table in layout.tables if table.name in held)
        parts.append(
            EmbeddingLayout(
                layout.dim, tables, tuple(features), full_embeddings=0, small_columns=start, unpooled=unpooled
            )
        )
    return parts


def tower_order_assembly(outputs: Sequence[int], device: torch.device) -> Regroup:
    """For outputs of tower modules: host after host."""
    starts = [sum(outputs[:host]) for host in range(len(outputs))]
    pieces = [[ColumnBlock(f"host {host}", starts[host], 0, columns)] for host, columns in enumerate(outputs)]
    return Regroup(pieces, device)
