"""The sparse side of a model on one rank: ids out, pooled embeddings back, by the flat or the tower exchange.

    flat     one all-to-all over all ranks each way (group.py over the world); tower modules, if any, come last
    tower    in-host exchange between two small ones over the peers (tower_exchange.py), tower modules in the middle

Both give the same numbers; without tower modules, in float32 and with whole rows or columns, to the last bit.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch, Ids
from megarec.distributed.collectives import FP32, Ledger, WireDtypes, build_channel
from megarec.distributed.topology import Topology
from megarec.sparse.exchange.direct import direct_assembly
from megarec.sparse.exchange.group import Distributed, Exchanged, TableGroup
from megarec.sparse.exchange.parts import joined, rows_of
from megarec.sparse.exchange.sequences import Padding, SequenceLookup, newest_of
from megarec.sparse.exchange.tower_exchange import (
    Back,
    Change,
    TowerExchange,
    tower_order_assembly,
)
from megarec.sparse.layout import EmbeddingLayout, Feature
from megarec.sparse.placement import Shard
from megarec.sparse.run_placement import at_most_ten, layouts_by_host, on_host, place_shards
from megarec.sparse.tables.base import State
from megarec.sparse.towers.replicas import TowerOptimizer, TowerReplicas
from megarec.sparse.towers.sizes import NO_TOWERS, ResolvedTowers


class StepLookup:
    """The lookup of one step, and the way back of its gradient, by micro-batches: `micro_batch` and `send_back` of
    each in turn, then `apply` or `skip`.

    Args:
        exchanged: returns the dense model's input for this rank's examples: [B, layout.width], or the columns that the
            tower modules emit.
        size: B.
        micro_batches: divides B.
        parts: number of messages that they travel in: one for each micro-batch, or 1.
        leaf: the input of the tower modules; None: there are none, or no gradients.
        ids: what was looked up.
        features: whose columns those of `leaf`, else of `values`, are.
        modules: the tower modules of this rank.
        padding: where sequences lie behind the other columns; None: there are none.
    """

    def __init__(
        self,
        exchanged: Exchanged,
        leaf: Tensor | None,
        ids: Distributed,
        features: tuple[Feature, ...],
        modules: TowerReplicas | None,
        micro_batches: int,
        parts: int,
        padding: Padding | None = None,
    ) -> None:
        self._padding = padding
        self._exchanged, self._leaf, self._ids, self._features, self._modules = exchanged, leaf, ids, features, modules
        self._micro_batches, self._parts = micro_batches, parts
        self._arrived: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._totals: list[Tensor] = []

    def micro_batch(self, micro: int) -> Tensor:
        """[B / micro-batches, columns]: the embeddings of a micro-batch, waited for; the next ones start on their way;
        collective."""
        if self._parts == 1:
            return rows_of(self.values, micro, self._micro_batches)
        self._arrived.append(self._exchanged.arrive(micro))
        return self._arrived[micro]

    @property
    def values(self) -> Tensor:
        """[B, columns], those of all micro-batches; collective."""
        self._arrived += [self._exchanged.arrive(part) for part in range(len(self._arrived), self._parts)]
        return joined(self._arrived)

    def send_back(self, micro: int, gradient: Tensor) -> None:
        """Start the gradient of a micro-batch on its way; after the last one, the gradients of tower modules and of
        what the ranks sent are computed; changes nothing; collective.

        Args:
            gradient: [B / micro-batches, columns], of the mean over this rank's examples; that of the mean over the
                global batch is made of it here.
        """
        self._gradients.append(gradient)
        if self._parts > 1:
            self._leave(micro, gradient)
        elif micro + 1 == self._micro_batches:
            self._leave(0, joined(self._gradients))

    def backward(self, gradient: Tensor) -> None:
        """`send_back` of all micro-batches: [B, columns]."""
        for micro in range(self._micro_batches):
            self.send_back(micro, rows_of(gradient, micro, self._micro_batches))

    def _leave(self, part: int, gradient: Tensor) -> None:
        total = self._exchanged.leave(part, gradient)
        self._totals.append(gradient.sum(dtype=torch.float32) if total is None else total)

    def apply(self) -> None:
        """The gradients of tables, and the change of tables and tower modules; collective."""
        self._exchanged.update()
        if self._modules is not None:
            self._modules.update()

    def skip(self) -> None:
        """In place of `apply`: forget the gradients."""
        self._exchanged.forget()
        if self._modules is not None:
            self._modules.skip()

    def gradient_total(self) -> Tensor:
        """Float32 scalar, finite only if every element of the gradients that were sent back is."""
        return self._totals[0] if len(self._totals) == 1 else torch.stack(self._totals).sum()

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that followed, by name: the gradients of this rank's tower modules, not yet summed over their
        replicas, and of the embeddings that the modules take in."""
        if self._modules is None or self._leaf is None:
            return {}
        assert self._leaf.grad is not None, "the gradients come first"
        return self._modules.gradients() | {"embeddings before the tower modules": self._leaf.grad}

    def looked_up(self, batch: Batch) -> tuple[Tensor, tuple[Feature, ...], Mapping[str, Ids]]:
        """The output of the tables, to find which of them is at fault.

        Args:
            batch: of this rank.

        Returns:
            Embeddings [examples, columns], the features whose columns they are, and the ids that were looked up. With
            tower modules they are those that this rank's modules took in, under the tower exchange for the examples of
            its peers as well, and no sequences; without, those of this rank's examples.
        """
        if self._leaf is None and self._padding is not None:
            values, unpooled = self._padding.by_feature(self.values)
            return values, (*self._features, *unpooled), batch.ids
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
        messages: types in which embeddings and their gradients travel.
        dtype: of the embeddings that the dense model sees: the type in which it computes, or float32.
        ids: the topology with groups of its own for ids (`separate_groups`), so that `distribute` may run in a thread
            while other messages travel; None: ids share the groups.
        shards: where the tables lie, all of them (`place_run`); None: as the config places them, no table replicated by
            "auto", which judges them by the batch.
        overlap: micro-batches travel one by one, each while another computes; else all at once.

    Raises:
        UserError: the tables cannot be placed on that many ranks, or not held by the backend that the config names; or
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
        overlap: bool = False,
    ) -> None:
        self._layout, self._topology, self._rate = layout, topology, config.learning_rate
        self.decaying = {table.name for table in layout.tables if config.rule_of(table.name).lazy_decay}
        self._dtype, self._overlap = dtype, overlap
        self._exchange: TowerExchange | None = None
        world, tower, peer = (build_channel(topology, name, ledger, ids) for name in ("world", "tower", "peer"))
        parts = layouts_by_host(layout, topology, exchange, towers)
        self.shards = place_shards(parts, config, topology, exchange) if shards is None else shards
        if exchange == "flat":
            self._group = TableGroup(parts[0], self.shards, config, world, blocks=1, messages=messages, device=device)
        else:
            outputs, sections = [part.width for part in parts], list[int]()
            if towers.towers is not None and towers.modules is not None:
                of_host = [towers.towers.of_host(host, topology.hosts) for host in range(topology.hosts)]
                outputs = [towers.modules.output_columns(held) for held in of_host]
                assembly = tower_order_assembly(outputs, device)
            else:
                assembly, sections = direct_assembly(layout, parts, self.shards, config, topology, device)
            self._exchange = TowerExchange(
                parts, on_host(self.shards, topology), config, tower=tower, peer=peer, outputs=outputs,
                assembly=assembly, sections=sections, messages=messages, device=device,
            )  # fmt: skip
            self._group = self._exchange.group
        for tables in self._group.tables:
            tables.fill(seed)
        self._padding = Padding(layout) if layout.sequences else None
        self.modules: TowerReplicas | None = None
        if towers.towers is not None and towers.modules is not None:
            assert tower_optimizer is not None
            host, hosts, replicas = (0, 1, world) if exchange == "flat" else (topology.host, topology.hosts, tower)
            here = towers.towers.of_host(host, hosts)
            self.modules = TowerReplicas(towers.modules, here, tower_optimizer, replicas, seed, device)
        self._l2 = _looked_up_l2(layout if self.modules is None else self._group.layout, config, device)
        self._unpooled_l2 = {feature.name: config.looked_up_l2(feature.table) for feature in layout.unpooled}

    @property
    def id_order(self) -> list[str]:
        """Features in the order in which `distribute` sends their ids: a batch in that order is not copied."""
        return (self._exchange or self._group).id_order

    def distribute(self, batch: Batch) -> Distributed:
        """Send the ids of a batch to the owners of the tables (TorchRec's input_dist); reads no table; collective."""
        if self._padding is not None:
            batch = dataclasses.replace(batch, ids=newest_of(batch, self._layout))
        return (self._exchange or self._group).distribute(batch)

    def forward(self, ids: Distributed, micro_batches: int = 1) -> StepLookup:
        """Look up, pool and start to send back (TorchRec's lookup and output_dist); collective.

        With gradients enabled the lookup carries the update: `send_back` of every micro-batch, then its `apply` or
        `skip` must follow.
        """
        leaf: Tensor | None = None
        # Tower modules take all examples at once, so that the sums of their gradients do not depend on the parts. What
        # they emit is what travels under the tower exchange; under the flat one it is what they take in.
        overlap = self._overlap and (self.modules is None or self._exchange is not None)
        parts = micro_batches if overlap else 1
        peers = self._topology.hosts if self._exchange is not None else 1
        examples = ids.size // peers * self._topology.world_size
        l2 = self._l2 if self._l2 is None else 2 * self._l2 / examples

        def change(pooled: Tensor) -> tuple[Tensor, Back]:
            """Changes to looked-up embeddings before they go on, and to their gradient on its way back."""
            nonlocal leaf
            if self.modules is None:
                return pooled, lambda gradient: _add_l2(gradient, pooled, l2)
            if not torch.is_grad_enabled():
                return self.modules(pooled), lambda gradient: gradient
            leaf = pooled.requires_grad_()
            made = self.modules(leaf)
            return made, lambda gradient: _add_l2(_through(made, leaf, gradient), pooled.detach(), l2)

        world_size = self._topology.world_size
        exchanged: Exchanged
        if self._exchange is not None and self.modules is None:
            exchanged = (
                ChangedLookup(self._exchange.pool_direct(ids, parts=parts), change, self._dtype, world_size)
                if l2 is not None
                else self._exchange.pool_direct(ids, self._dtype, world_size, parts)
            )
        elif self._exchange is not None:
            exchanged = self._exchange.pool(ids, change, self._dtype, world_size, parts)
        elif self.modules is None and l2 is None:
            exchanged = self._group.pool(ids, self._dtype, world_size, parts)
        else:
            exchanged = ChangedLookup(self._group.pool(ids, parts=parts), change, self._dtype, world_size)
        if self._padding is not None:
            own = ids.ids if ids.own is None else ids.own
            exchanged = SequenceLookup(
                exchanged, (self._exchange or self._group).rows(ids), self._padding, own, ids.size // peers // parts,
                parts=parts, dtype=self._dtype, divide=world_size,
                l2={feature: 2 * l2 / examples for feature, l2 in self._unpooled_l2.items()},
            )  # fmt: skip
        features = (self._layout if leaf is None else self._group.layout).features
        return StepLookup(exchanged, leaf, ids, features, self.modules, micro_batches, parts, self._padding)

    def look_up(self, batch: Batch) -> StepLookup:
        """`distribute` and `forward`."""
        return self.forward(self.distribute(batch))

    def scale_learning_rate(self, factor: float) -> None:
        """Set the rates of tables and tower modules to `factor` x their base rates."""
        for tables in self._group.tables:
            tables.set_learning_rate(factor * self._rate)
        if self.modules is not None:
            self.modules.scale_learning_rate(factor)

    def memory_bytes(self) -> int:
        """Bytes of this rank's table weights and their optimizer state."""
        return sum(tables.memory_bytes() for tables in self._group.tables)

    def row_usage(self) -> dict[str, float]:
        """Share of the rows that training has looked up so far, for every table of this rank."""
        return {name: share for tables in self._group.tables for name, share in tables.row_usage().items()}

    def settle(self, names: Collection[str] | None = None) -> None:
        """Apply pending decay to rows, before `state` is saved, and before another takes its
        place. Lookups apply pending decay to what they read.

        Args:
            names: of tables, with which others may be settled; None: of all.
        """
        for tables in self._group.tables:
            tables.settle(names)

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
        """Lines for the log: which rank holds which tables, in which backend and why."""
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


class ChangedLookup:
    """An `Exchanged` with L2, or of the flat exchange with tower modules, behind it, part by part."""

    def __init__(self, inner: Exchanged, change: Change, dtype: torch.dtype, divide: int) -> None:
        self._inner, self._change, self._dtype, self._divide = inner, change, dtype, divide
        self._back: list[Back] = []

    def arrive(self, part: int) -> Tensor:
        made, back = self._change(self._inner.arrive(part))
        self._back.append(back)
        return made.detach().to(self._dtype)

    def leave(self, part: int, gradient: Tensor) -> Tensor | None:
        self._inner.leave(part, self._back[part](gradient.float() / self._divide))
        return None

    def update(self) -> None:
        self._inner.update()

    def forget(self) -> None:
        self._inner.forget()


def _looked_up_l2(layout: EmbeddingLayout, config: EmbeddingConfig, device: torch.device) -> float | Tensor | None:
    """L2 on looked-up embeddings: of all of them, or float32 [columns of the layout]; None: of none."""
    weights = [config.looked_up_l2(feature.table) for feature in layout.features]
    if not any(weights):
        return None
    if len(set(weights)) == 1:
        return weights[0]
    by_column = [weight for weight, f in zip(weights, layout.features, strict=True) for _ in range(f.columns)]
    return torch.tensor(by_column, device=device)


def _add_l2(gradient: Tensor, pooled: Tensor, l2: float | Tensor | None) -> Tensor:
    """Adds L2 to the objective, the mean over the global batch of |e|^2, by its gradient.

    On the looked-up embeddings, so that it acts on every backend: FBGEMM ignores its own weight decay on CPUs.

    Args:
        l2: embedding.l2 x 2 / global batch, of all columns or of each.
    """
    if l2 is None:
        return gradient
    return gradient.float().add(pooled, alpha=l2) if isinstance(l2, float) else gradient.float().addcmul(pooled, l2)


def _through(made: Tensor, leaf: Tensor, gradient: Tensor) -> Tensor:
    """Back through the tower modules, which keep the gradients of their weights."""
    made.backward(gradient.to(made.dtype))
    assert leaf.grad is not None
    return leaf.grad
