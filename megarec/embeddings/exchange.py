"""The sparse side of a model on one rank: ids out, pooled embeddings back, by the flat or the tower exchange.

    flat     one all-to-all over all ranks each way (group.py over the world)
    tower    in-host exchange between two small ones over the peers (tower_exchange.py)

Both give the same numbers; with identity towers, float32 messages and whole rows or columns, to the last bit.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch
from megarec.embeddings.group import Distributed, TableGroup
from megarec.embeddings.layout import EmbeddingLayout
from megarec.embeddings.placement import Shard, place, place_on_hosts
from megarec.embeddings.tables import State
from megarec.embeddings.tower_exchange import TowerExchange, canonical_assembly, host_layouts
from megarec.errors import UserError
from megarec.parallel.collectives import FP32, Ledger, Messages, build_channel
from megarec.topology import Topology

Towers = Sequence[Sequence[str]]


class SparseSide:
    """Tables and exchange of one rank.

    Args:
        seed: of the initial weights.
        ledger: counts the bytes sent.
        towers: features by tower: the tower exchange; None: the flat one.
        messages: in which types embeddings and their gradients travel.
        shards: where the tables lie, all of them; None: as the config places them.

    Raises:
        UserError: the tables cannot be placed on so many ranks, or not held by the backend that the config names.
    """

    def __init__(
        self,
        layout: EmbeddingLayout,
        config: EmbeddingConfig,
        topology: Topology,
        *,
        seed: int,
        device: torch.device,
        ledger: Ledger,
        towers: Towers | None = None,
        messages: Messages = FP32,
        shards: tuple[Shard, ...] | None = None,
    ) -> None:
        self.layout = layout
        self._topology, self._l2 = topology, config.l2
        self._exchange: TowerExchange | None = None
        if towers is None:
            self.shards = place(layout, config.placement, topology.world_size) if shards is None else shards
            world = build_channel(topology, "world", ledger)
            self._group = TableGroup(layout, self.shards, config, world, blocks=1, messages=messages, device=device)
        else:
            hosts = host_layouts(layout, towers, topology.hosts)
            self.shards = place_on_hosts(hosts, config.placement, topology.ranks_per_host) if shards is None else shards
            self._exchange = TowerExchange(
                hosts,
                on_host(self.shards, topology),
                config,
                tower=build_channel(topology, "tower", ledger),
                peer=build_channel(topology, "peer", ledger),
                outputs=[part.width for part in hosts],
                assembly=canonical_assembly(layout, hosts),
                messages=messages,
                device=device,
            )
            self._group = self._exchange.group
        self._group.tables.fill(seed, config.initial_std)

    def forward(self, batch: Batch) -> Tensor:
        """Pooled embeddings of this rank's examples, float32 [B, layout.width]; every rank must take part.

        With gradients enabled the result carries the update: `result.backward(gradient)`, once an optimizer step and
        on every rank, where `gradient` is that of the mean over the *global* batch (the rank's own mean, divided by
        the number of ranks). Without, nothing is recorded and no table changes.
        """
        return self.pool(self.distribute(batch))

    def distribute(self, batch: Batch) -> Distributed:
        """The first half of `forward`: ids to the owners of the tables; reads no table."""
        return (self._exchange or self._group).distribute(batch)

    def pool(self, batch: Distributed) -> Tensor:
        """The second half of `forward`."""
        if self._exchange is None:
            return self._with_l2(self._group.pool(batch))
        return self._exchange.pool(batch, self._with_l2)

    def _with_l2(self, pooled: Tensor) -> Tensor:
        """Adds l2 x mean over the global batch of |e|^2 to the objective, by its gradient 2 l2 e / global batch.

        On the looked-up embeddings, so that it acts on every backend: FBGEMM ignores its own weight decay on CPUs.
        """
        if self._l2 and pooled.requires_grad:
            looked_up = pooled.detach()
            peers = self._topology.hosts if self._exchange is not None else 1
            global_batch = pooled.shape[0] // peers * self._topology.world_size
            pooled.register_hook(lambda gradient: gradient.add(looked_up, alpha=2 * self._l2 / global_batch))
        return pooled

    def set_learning_rate(self, rate: float) -> None:
        self._group.tables.set_learning_rate(rate)

    def memory_bytes(self) -> int:
        """Bytes of this rank's weights and optimizer state."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.state().values())

    def row_usage(self) -> dict[str, float]:
        """Share of the rows that training has looked up so far, for every table of this rank."""
        return self._group.tables.row_usage()

    def state(self) -> State:
        """Everything a checkpoint keeps, by "<table>/<what>", as slices of global tensors; live tensors, no copies.

        <what> is weight [rows, columns], the optimizer's state (square_sum, first_moment and second_moment
        [rows, columns], rowwise_square_sum [rows, 1], steps [1, 1]) or touched, bool [rows, 1] (see `row_usage`).
        """
        return self._group.tables.state()

    def load_state(self, state: State) -> None:
        """Copy what `state` returned, from the same placement.

        Raises:
            UserError: a tensor is missing, unknown, or another slice than this rank's.
        """
        mine = self.state()
        for name, (shard, _) in mine.items():
            if name in state and state[name][0] != shard:
                raise UserError(f"checkpoint: {name} is the slice {state[name][0]}, this rank holds {shard}")
        self.load_state_dict({name: tensor for name, (_, tensor) in state.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of `state`, for a checkpoint that is read back by the same rank of the same topology."""
        return {name: tensor for name, (_, tensor) in self.state().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy what `state_dict` returned.

        Raises:
            UserError: a tensor is missing, unknown, or of another shape or type.
        """
        self._group.tables.load(state)

    def describe(self) -> list[str]:
        """Lines for the log: who holds what, in which backend and why."""
        lines = []
        for owner in range(self._topology.world_size):
            shards = [shard for shard in self.shards if shard.rank == owner]
            size = sum(shard.rows * shard.columns for shard in shards)
            lines.append(f"tables: rank {owner} holds {len(shards)} shards, {size:,} weights")
        reasons: dict[str, list[str]] = {}
        for table, choice in self._group.choices.items():
            reasons.setdefault(f"{choice.backend} ({choice.reason})", []).append(table)
        return _shortened(lines) + [
            f"tables: {', '.join(_shortened(tables))} in {reason}" for reason, tables in reasons.items()
        ]


def _shortened(entries: list[str]) -> list[str]:
    """At most ten: hundreds of tables or ranks would drown the log."""
    return entries if len(entries) <= 10 else [*entries[:8], f"... ({len(entries) - 9} more)", entries[-1]]


def on_host(shards: Sequence[Shard], topology: Topology) -> tuple[Shard, ...]:
    """The shards of this rank's host, by local rank."""
    first = topology.host * topology.ranks_per_host
    own = (shard for shard in shards if first <= shard.rank < first + topology.ranks_per_host)
    return tuple(dataclasses.replace(shard, rank=shard.rank - first) for shard in own)
