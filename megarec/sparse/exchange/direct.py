"""The tower exchange without tower modules: nothing is assembled in the middle.

An owner's rows are the global batch in order, so those of one peer's examples are L neighbouring blocks, one for each
rank of the host. Inside the host they travel as pieces, and arrive as the message to the peers. One pass at the end
puts columns in their place, makes means and changes the type.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.distributed.collectives import Channel, Message, WireDtypes, all_to_all, start_all_to_all
from megarec.distributed.topology import Topology
from megarec.sparse.exchange.regroup import ColumnBlock, Regroup
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.lookups import Lookup, plan_lookups
from megarec.sparse.placement import Shard
from megarec.sparse.tables.base import Pooled
from megarec.sparse.tables.local import routes_of, split_replicated


class DirectLookup:
    """An `Exchanged`, of one part.

    Args:
        inner: [peers, blocks of the examples of each] of this host's columns.
        assembly: see `direct_assembly`.
        sizes: numbers that this rank receives from every peer, and that it sends to each.
        messages: the types between hosts; `wire`: that of the gradient, where there is one host.
        size: B.
    """

    def __init__(
        self, inner: Pooled, assembly: Regroup, sizes: tuple[list[int], list[int]], peer: Channel, messages: WireDtypes,
        wire: torch.dtype, divisors: Tensor | None, size: int, dtype: torch.dtype, divide: int,
    ) -> None:  # fmt: skip
        self._inner, self._assembly, self._sizes, self._peer = inner, assembly, sizes, peer
        self._messages, self._divisors, self._size = messages, divisors, size
        self._wire = messages.backward if peer.size > 1 else wire
        self._dtype, self._divide = dtype, divide
        self._back: Message | None = None

    def arrive(self, part: int) -> Tensor:
        received, sent = self._sizes
        message = self._inner.values.view(-1)
        if self._peer.size > 1:
            message = message.to(self._messages.forward)
        blocks = all_to_all(message, received, sent, self._peer, "towers")
        return self._assembly.assemble(blocks, self._divisors, self._size, self._dtype)

    def leave(self, part: int, gradient: Tensor) -> Tensor | None:
        received, sent = self._sizes
        blocks, total = self._assembly.scatter(gradient, self._divisors, self._size, self._wire, self._divide)
        self._back = start_all_to_all(blocks, sent, received, self._peer, "towers", "backward")
        return total

    def update(self) -> None:
        assert self._back is not None, "leave comes first"
        self._inner.update(self._back.wait().view(self._inner.values.shape))

    def forget(self) -> None:
        if self._back is not None:
            self._back.wait()


def direct_assembly(
    layout: EmbeddingLayout,
    hosts: Sequence[EmbeddingLayout],
    shards: Sequence[Shard],
    config: EmbeddingConfig,
    topology: Topology,
    device: torch.device,
) -> Regroup:
    """Every column of the owners' blocks of all hosts to its place in the whole layout.

    Args:
        shards: of all hosts' tables; their ranks are those of the whole job.
    """
    whole = {feature.name: feature.start for feature in layout.features}
    local, pieces = topology.ranks_per_host, []
    for host, part in enumerate(hosts):
        inside = {feature.name: feature.start for feature in part.features}
        first = host * local
        held = [dataclasses.replace(s, rank=s.rank - first) for s in shards if first <= s.rank < first + local]
        for block in _column_blocks(part, held, config, local, topology.rank % local, device):
            pieces.append([dataclasses.replace(p, start=whole[p.feature] + p.start - inside[p.feature]) for p in block])
    return Regroup(pieces, device, [f.name for f in layout.features if f.multi_valued and f.pooling == "mean"])


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
