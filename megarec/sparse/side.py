"""The sparse side of a model on one rank: ids out, pooled embeddings back, by the flat or the tower exchange.

    flat     one all-to-all over all ranks each way (group.py over the world); tower modules, if any, come last
    tower    in-host exchange between two small ones over the peers (tower_exchange.py), tower modules in the middle

Both give the same numbers; without tower modules, in float32 and with whole rows or columns, to the last bit.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch, Ids
from megarec.distributed.collectives import FP32, Ledger, WireDtypes, build_channel
from megarec.distributed.topology import Topology
from megarec.sparse.exchange.group import Distributed, Exchanged, TableGroup
from megarec.sparse.exchange.regroup import Scattered
from megarec.sparse.exchange.tower_exchange import (
    Back,
    Change,
    TowerExchange,
    canonical_assembly,
    tower_order_assembly,
)
from megarec.sparse.layout import EmbeddingLayout, Feature
from megarec.sparse.placement import Shard
from megarec.sparse.run_placement import at_most_ten, layouts_by_host, on_host, place_shards
from megarec.sparse.tables.base import State
from megarec.sparse.towers.replicas import TowerOptimizer, TowerReplicas
from megarec.sparse.towers.sizes import NO_TOWERS, ResolvedTowers


class StepLookup:
    """What one step looked up, and the way back of its gradient: `backward`, then `apply` or `skip`.

    Args:
        exchanged: its values [B, columns] are what the dense model sees of this rank's examples: [B, layout.width], or
            the columns that the tower modules emit.
        leaf: what the tower modules took in; None: there are none, or no gradients.
        ids: what was looked up.
        features: whose columns those of `leaf`, else of `values`, are.
        modules: the tower modules of this rank.
    """

    def __init__(
        self,
        exchanged: Exchanged,
        leaf: Tensor | None,
        ids: Distributed,
        features: tuple[Feature, ...],
        modules: TowerReplicas | None,
    ) -> None:
        self.values = exchanged.values
        self._exchanged, self._leaf, self._ids, self._features, self._modules = exchanged, leaf, ids, features, modules
        self._gradient: Tensor | None = None
        self._made: Scattered | None = None

    def backward(self, gradient: Tensor) -> None:
        """The gradients of tower modules and of what the ranks sent; changes nothing; collective.

        Args:
            gradient: [B, columns], of the mean over this rank's examples; that of the mean over the global batch is
                made of it here.
        """
        self._gradient, self._made = gradient, self._exchanged.scatter(gradient)

    def apply(self) -> None:
        """The gradients of tables, and the change of tables and tower modules; collective."""
        assert self._made is not None, "backward comes first"
        self._exchanged.update(self._made.blocks)
        if self._modules is not None:
            self._modules.update()

    def skip(self) -> None:
        """In place of `apply`: forget the gradients."""
        if self._modules is not None:
            self._modules.skip()

    def gradient_total(self) -> Tensor:
        """Float32 scalar, finite only if every element of the gradient that `backward` took is."""
        assert self._made is not None and self._gradient is not None, "backward comes first"
        return self._gradient.sum(dtype=torch.float32) if self._made.total is None else self._made.total

    def gradients(self) -> dict[str, Tensor]:
        """What `backward` has made, by name: the gradients of this rank's tower modules, not yet summed over their
        replicas, and of the embeddings that the modules take in."""
        if self._modules is None or self._leaf is None:
            return {}
        assert self._leaf.grad is not None, "backward comes first"
        return self._modules.gradients() | {"embeddings before the tower modules": self._leaf.grad}

    def looked_up(self, batch: Batch) -> tuple[Tensor, tuple[Feature, ...], Mapping[str, Ids]]:
        """What came out of the tables, to tell which of them is at fault.

        Args:
            batch: of this rank.

        Returns:
            Embeddings [examples, columns], the features whose columns they are, and the ids that were looked up. With
            tower modules they are those that this rank's modules took in, under the tower exchange for the examples of
            its peers as well; without, those of this rank's examples.
        """
        if self._leaf is None:
            return self.values, self._features, batch.ids
        return self._leaf.detach(), self._features, self._ids.ids


class SparseSide:
    """Tables, tower modules and exchange of one rank.

    Args:
        seed: of the initial weights.
        ledger: counts the bytes sent.
        exchange: "tower" needs towers.
        towers: features by tower, and the sizes of their modules.
        tower_optimizer: of the modules; None when there are none.
        messages: in which types embeddings and their gradients travel.
        dtype: of the embeddings that the dense model sees: the type in which it computes, or float32.
        ids: the topology with groups of its own for ids (`separate_groups`), so that `distribute` may run in a thread
            while other messages travel; None: ids share the groups.
        shards: where the tables lie, all of them (`place_run`); None: as the config places them, no table replicated by
            "auto", which judges them by the batch.

    Raises:
        UserError: the tables cannot be placed on so many ranks, or not held by the backend that the config names; or
            the hosts cannot share the towers equally.
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
        exchange: Literal["flat", "tower"] = "flat",
        towers: ResolvedTowers = NO_TOWERS,
        tower_optimizer: TowerOptimizer | None = None,
        messages: WireDtypes = FP32,
        dtype: torch.dtype = torch.float32,
        ids: Topology | None = None,
        shards: tuple[Shard, ...] | None = None,
    ) -> None:
        self._layout, self._topology, self._l2, self._rate = layout, topology, config.l2, config.learning_rate
        self._dtype = dtype
        self._exchange: TowerExchange | None = None
        world, tower, peer = (build_channel(topology, name, ledger, ids) for name in ("world", "tower", "peer"))
        parts = layouts_by_host(layout, topology, exchange, towers)
        self.shards = place_shards(parts, config, topology, exchange) if shards is None else shards
        if exchange == "flat":
            self._group = TableGroup(parts[0], self.shards, config, world, peers=1, messages=messages, device=device)
        else:
            if towers.towers is not None and towers.modules is not None:
                of_host = [towers.towers.of_host(host, topology.hosts) for host in range(topology.hosts)]
                outputs = [towers.modules.output_columns(held) for held in of_host]
                assembly = tower_order_assembly(outputs, device)
            else:
                outputs = [part.width for part in parts]
                assembly = canonical_assembly(layout, parts, self.shards, config, topology, device)
            self._exchange = TowerExchange(
                parts, on_host(self.shards, topology), config, tower=tower, peer=peer, outputs=outputs,
                assembly=assembly, through=towers.modules is not None, messages=messages, device=device,
            )  # fmt: skip
            self._group = self._exchange.group
        for tables in self._group.tables:
            tables.fill(seed, config.initial_std)
        self.modules: TowerReplicas | None = None
        if towers.towers is not None and towers.modules is not None:
            assert tower_optimizer is not None
            host, hosts, replicas = (0, 1, world) if exchange == "flat" else (topology.host, topology.hosts, tower)
            here = towers.towers.of_host(host, hosts)
            self.modules = TowerReplicas(towers.modules, here, tower_optimizer, replicas, seed, device)

    def distribute(self, batch: Batch) -> Distributed:
        """Send the ids of a batch to the owners of the tables (TorchRec's input_dist); reads no table; collective."""
        return (self._exchange or self._group).distribute(batch)

    def forward(self, ids: Distributed) -> StepLookup:
        """Look up, pool and send back (TorchRec's lookup and output_dist); collective.

        With gradients enabled the lookup carries the update: its `backward`, then its `apply` or `skip` must follow.
        """
        leaf: Tensor | None = None

        def change(pooled: Tensor) -> tuple[Tensor, Back]:
            """What happens to looked-up embeddings before they go on, and to their gradient on its way back."""
            nonlocal leaf
            if self.modules is None:
                return pooled, lambda gradient: self._add_l2(gradient, pooled)
            if not torch.is_grad_enabled():
                return self.modules(pooled), lambda gradient: gradient
            leaf = pooled.requires_grad_()
            made = self.modules(leaf)
            return made, lambda gradient: self._add_l2(_through(made, leaf, gradient), pooled.detach())

        if self._exchange is not None and self.modules is not None:
            exchanged = self._exchange.pool_through(ids, change, self._dtype, self._topology.world_size)
        elif self.modules is None and not self._l2:
            exchanged = (self._exchange or self._group).pool(ids, self._dtype, self._topology.world_size)
        else:
            exchanged = self._changed((self._exchange or self._group).pool(ids), change)
        features = (self._layout if leaf is None else self._group.layout).features
        return StepLookup(exchanged, leaf, ids, features, self.modules)

    def look_up(self, batch: Batch) -> StepLookup:
        """`distribute` and `forward`."""
        return self.forward(self.distribute(batch))

    def _changed(self, inner: Exchanged, change: Change) -> Exchanged:
        """An exchange with L2, or the flat one with tower modules, behind it."""
        made, back = change(inner.values)

        def scatter(gradient: Tensor) -> Scattered:
            return Scattered(inner.scatter(back(gradient.float() / self._topology.world_size)).blocks, None)

        return Exchanged(made.detach().to(self._dtype), scatter, inner.update)

    def _add_l2(self, gradient: Tensor, pooled: Tensor) -> Tensor:
        """Adds l2 x mean over the global batch of |e|^2 to the objective, by its gradient 2 l2 e / global batch.

        On the looked-up embeddings, so that it acts on every backend: FBGEMM ignores its own weight decay on CPUs.
        """
        if not self._l2:
            return gradient
        peers = self._topology.hosts if self._exchange is not None and self.modules is not None else 1
        global_batch = pooled.shape[0] // peers * self._topology.world_size
        return gradient.float().add(pooled, alpha=2 * self._l2 / global_batch)

    def scale_learning_rate(self, factor: float) -> None:
        """Set the rates of tables and tower modules to `factor` x their base rates."""
        for tables in self._group.tables:
            tables.set_learning_rate(factor * self._rate)
        if self.modules is not None:
            self.modules.scale_learning_rate(factor)

    def memory_bytes(self) -> int:
        """Bytes of this rank's table weights and their optimizer state."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.state().values())

    def row_usage(self) -> dict[str, float]:
        """Share of the rows that training has looked up so far, for every table of this rank."""
        return {name: share for tables in self._group.tables for name, share in tables.row_usage().items()}

    def state(self) -> State:
        """The tables as a checkpoint keeps them, by "<table>/<what>", as slices of global tensors; live, no copies.

        <what> is weight [rows, columns], the optimizer's state (square_sum, first_moment and second_moment
        [rows, columns], rowwise_square_sum [rows, 1], steps [1, 1]) or touched, bool [rows, 1] (see `row_usage`).
        """
        return {name: entry for tables in self._group.tables for name, entry in tables.state().items()}

    def replicated(self) -> State:
        """`state` of the replicated tables: every rank holds them whole; of the host, under the tower exchange."""
        return {
            name: entry for tables in self._group.tables if tables.replicated for name, entry in tables.state().items()
        }

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
        return at_most_ten(lines) + [
            f"tables: {', '.join(at_most_ten(tables))} in {reason}" for reason, tables in reasons.items()
        ]


def _through(made: Tensor, leaf: Tensor, gradient: Tensor) -> Tensor:
    """Back through the tower modules, which keep the gradients of their weights."""
    made.backward(gradient.to(made.dtype))
    assert leaf.grad is not None
    return leaf.grad
