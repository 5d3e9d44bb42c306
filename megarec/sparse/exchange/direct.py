"""The tower exchange without tower modules: nothing is assembled in the middle.

An owner's rows are the global batch in order, so those of one peer's examples are L neighbouring blocks, one for each
rank of the host. Inside the host they travel as pieces, and arrive as the message to the peers; a part of it has the
same rows of each block. One pass at the end puts columns in their place, makes means and changes the type.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.distributed.topology import Topology
from megarec.sparse.exchange.parts import PartedExchange, columns_of
from megarec.sparse.exchange.regroup import ColumnBlock, Regroup
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.lookups import Lookup, plan_lookups
from megarec.sparse.placement import Shard
from megarec.sparse.tables.base import Pooled
from megarec.sparse.tables.local import routes_of, split_replicated


class DirectLookup:
    """An `Exchanged`: hop d by parts; hop b, inside the host, for all of them at once.

    Args:
        inner: [peers, blocks of the examples of each] of this host's columns.
        peers: of `inner` to its peers.
        assembly: see `direct_assembly`.
        divisors: see `Regroup.divisors`; of this rank's examples.
        size: examples of a part.
    """

    def __init__(
        self,
        inner: Pooled,
        peers: PartedExchange,
        assembly: Regroup,
        divisors: Tensor | None,
        size: int,
        dtype: torch.dtype,
        divide: int,
    ) -> None:
        self._inner, self._peers, self._assembly, self._divisors = inner, peers, assembly, divisors
        self._size, self._dtype, self._divide = size, dtype, divide

    def arrive(self, part: int) -> Tensor:
        divisors = columns_of(self._divisors, part, self._peers.parts)
        return self._assembly.assemble(self._peers.arrive(part), divisors, self._size, self._dtype)

    def leave(self, part: int, gradient: Tensor) -> Tensor | None:
        divisors, wire = columns_of(self._divisors, part, self._peers.parts), self._peers.messages.backward
        blocks, total = self._assembly.scatter(gradient, divisors, self._size, wire, self._divide)
        self._peers.leave(blocks)
        return total

    def update(self) -> None:
        self._inner.update(self._peers.gradient())

    def forget(self) -> None:
        self._peers.gradient()


def direct_assembly(
    layout: EmbeddingLayout,
    hosts: Sequence[EmbeddingLayout],
    shards: Sequence[Shard],
    config: EmbeddingConfig,
    topology: Topology,
    device: torch.device,
) -> tuple[Regroup, list[int]]:
    """Every column of the owners' blocks of all hosts to its place in the whole layout; and the columns of each of
    those blocks of this rank's host.

    Args:
        shards: of all hosts' tables; their ranks are those of the whole job.
    """
    whole = {feature.name: feature.start for feature in layout.features}
    local, pieces, sections = topology.ranks_per_host, list[list[ColumnBlock]](), list[int]()
    for host, part in enumerate(hosts):
        inside = {feature.name: feature.start for feature in part.features}
        first = host * local
        held = [dataclasses.replace(s, rank=s.rank - first) for s in shards if first <= s.rank < first + local]
        blocks = _column_blocks(part, held, config, local, topology.rank % local, device)
        if host == topology.host:
            sections = [sum(piece.columns for piece in block) for block in blocks]
        for block in blocks:
            pieces.append([dataclasses.replace(p, start=whole[p.feature] + p.start - inside[p.feature]) for p in block])
    mean = [f.name for f in layout.features if f.multi_valued and f.pooling == "mean"]
    return Regroup(pieces, device, mean), sections


def _column_blocks(
    layout: EmbeddingLayout, shards: Sequence[Shard], config: EmbeddingConfig, ranks: int, rank: int,
    device: torch.device,
) -> list[list[ColumnBlock]]:  # fmt: skip
    """What lies where in the blocks that a rank of a host has (`TableGroup.by_peer`): the columns that every rank of
    the host sends to it, the sums of tables split by rows, and the columns of replicated tables.

    Args:
        shards: of the host's tables; their ranks are local ranks.
    """
    spread, own = split_replicated(shards, rank)
    senders: list[list[Lookup]] = []
    if spread:
        slots = routes_of(layout, spread, config, ranks, device).slots
        whole = [[slot for slot in of_rank if not slot.by_rows] for of_rank in slots]
        by_rows = [slot for slot in slots[rank] if slot.by_rows]
        senders += [*(whole if any(whole) else []), *([by_rows] if by_rows else [])]
    if own:
        senders.append(list(plan_lookups(layout, own, ranks).slots[rank]))
    return [[ColumnBlock(s.feature.name, s.start, s.offset, s.columns) for s in slots] for slots in senders]
