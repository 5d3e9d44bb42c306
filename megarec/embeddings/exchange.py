"""The sparse side of a model under the flat exchange: ids out, lookup on the owners, pooled embeddings back.

    r-th slice of a global batch --ids, all-to-all--> owners of the tables: [world_size B, columns of the rank]
    [B, width] in layout order <--pooled embeddings, all-to-all-- the r-th block of B rows goes back to rank r

An owner's rows are the global batch in order, so that its output is laid out as it is sent, and the gradient of a
row is summed in the same order on every topology. The backward pass mirrors the exchange and updates the tables.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch
from megarec.embeddings.assembly import Assembly
from megarec.embeddings.ids import IdExchange
from megarec.embeddings.layout import EmbeddingLayout
from megarec.embeddings.local import LocalTables
from megarec.embeddings.placement import Shard, place
from megarec.embeddings.routes import build_routes
from megarec.embeddings.tables import State, choose_backends, wished_backend
from megarec.errors import UserError
from megarec.parallel.collectives import Channel, Ledger, all_to_all_with_grad


class SparseSide:
    """Tables and exchange of one rank.

    Args:
        world: group of all ranks; None for one process.
        seed: of the initial weights.
        ledger: counts the bytes sent.
        shards: where the tables lie, all of them; None: as the config places them.

    Raises:
        UserError: the tables cannot be placed on so many ranks, or not held by the backend that the config names.
    """

    def __init__(
        self,
        layout: EmbeddingLayout,
        config: EmbeddingConfig,
        *,
        world: dist.ProcessGroup | None,
        rank: int,
        world_size: int,
        seed: int,
        device: torch.device,
        ledger: Ledger,
        shards: tuple[Shard, ...] | None = None,
    ) -> None:
        self.layout = layout
        self.shards = place(layout, config.placement, world_size) if shards is None else shards
        self._channel = Channel("world", world, rank, world_size, ledger)
        self._choices = choose_backends(layout, self.shards, config, device)

        by_table = {table.name: [s for s in self.shards if s.table == table.name] for table in layout.tables}
        fused = {t for t, shards in by_table.items() if wished_backend(shards, config).backend == "fbgemm"}
        routes = build_routes(layout, self.shards, world_size, fused)
        self._ids = IdExchange(routes, self._channel, device)
        self._tables = LocalTables(
            routes.slots[rank], layout, self.shards, self._choices, config, self._channel, device
        )
        self._tables.fill(seed, config.initial_std)
        self._assembly = Assembly(routes, layout)
        self._columns = [routes.columns(owner) for owner in range(world_size)]

    def forward(self, batch: Batch) -> Tensor:
        """Pooled embeddings of this rank's examples, float32 [B, layout.width]; every rank must take part.

        With gradients enabled the result carries the update: `result.backward(gradient)`, once an optimizer step and
        on every rank, where `gradient` is that of the mean over the *global* batch (the rank's own mean, divided by
        the number of ranks). Without, nothing is recorded and no table changes.
        """
        pooled = self._tables.forward(self._ids(batch))
        size, rank, ranks = batch.size, self._channel.rank, self._channel.size
        blocks = all_to_all_with_grad(
            pooled.view(-1),
            [size * columns for columns in self._columns],
            [size * self._columns[rank]] * ranks,
            self._channel,
            "embeddings",
        )
        return self._assembly(blocks, batch)

    def set_learning_rate(self, rate: float) -> None:
        self._tables.set_learning_rate(rate)

    def memory_bytes(self) -> int:
        """Bytes of this rank's weights and optimizer state."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.state().values())

    def row_usage(self) -> dict[str, float]:
        """Share of the rows that training has looked up so far, for every table of this rank."""
        return self._tables.row_usage()

    def state(self) -> State:
        """Everything a checkpoint keeps, by "<table>/<what>", as slices of global tensors; live tensors, no copies.

        <what> is weight [rows, columns], the optimizer's state (square_sum, first_moment and second_moment
        [rows, columns], rowwise_square_sum [rows, 1], steps [1, 1]) or touched, bool [rows, 1] (see `row_usage`).
        """
        return self._tables.state()

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
        self._tables.load(state)

    def describe(self) -> list[str]:
        """Lines for the log: who holds what, in which backend and why."""
        lines = []
        for owner in range(self._channel.size):
            shards = [shard for shard in self.shards if shard.rank == owner]
            size = sum(shard.rows * shard.columns for shard in shards)
            lines.append(f"tables: rank {owner} holds {len(shards)} shards, {size:,} weights")
        reasons: dict[str, list[str]] = {}
        for table, choice in self._choices.items():
            reasons.setdefault(f"{choice.backend} ({choice.reason})", []).append(table)
        return _shortened(lines) + [
            f"tables: {', '.join(_shortened(tables))} in {reason}" for reason, tables in reasons.items()
        ]


def _shortened(entries: list[str]) -> list[str]:
    """At most ten: hundreds of tables or ranks would drown the log."""
    return entries if len(entries) <= 10 else [*entries[:8], f"... ({len(entries) - 9} more)", entries[-1]]


def add_l2(gradient: Tensor, embedded: Tensor, l2: float, global_batch: int) -> Tensor:
    """Add the gradient of l2 x mean over the global batch of |e|^2: 2 l2 e / global_batch.

    On the looked-up embeddings, so that it acts on every backend: FBGEMM ignores its own weight decay on CPUs.

    Args:
        gradient, embedded: [B, width].
        l2: `embedding.l2`; 0 returns `gradient` itself.
    """
    return gradient.add(embedded, alpha=2 * l2 / global_batch) if l2 else gradient
