"""Tables in plain torch: any optimizer, any width, row-wise Adagrad over column slices.

Replicated tables get one identical update on every rank of a group (`ReplicatedTorchTables`).

Row-wise Adagrad over column slices needs a sum over ranks (`ColumnShardSum`): it adds the mean of g^2 over the whole
row to its state, but the owner of a column slice sees only its part of the row. All owners of a table look up the same
ids in the same order, so the same unique rows: they exchange their partial sums, and each adds all of them in the
same order, so that every copy of the state stays equal to the last bit.
"""

import itertools
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.distributed.collectives import Channel, all_reduce_sum, all_to_all
from megarec.sparse.lookups import Lookup
from megarec.sparse.placement import Shard
from megarec.sparse.tables.base import LocalIds, LocalShard, Pooled, State, Unpooled
from megarec.sparse.tables.optimizers import ROW_OPTIMIZERS, Hyperparameters, RowGradient
from megarec.sparse.tables.stacked import StackedTable

SumSquares = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Per table of this rank: sums of squares of its touched rows over this rank's columns -> over all columns."""


class TorchTables:
    """Shards of this rank, neighbours of equal width stacked.

    Args:
        table_columns: columns of each shard's whole table.
        unpooled: the slots of this rank whose rows are looked up one by one.
        sum_squares: sums partial squares over the owners of a table (co_owners.py); None: every shard has whole rows.
        sum_over_ranks: of a number, where gradients are clipped: every rank updates once a step; collective.
    """

    def __init__(
        self,
        shards: Sequence[LocalShard],
        table_columns: Sequence[int],
        config: EmbeddingConfig,
        device: torch.device,
        sum_squares: SumSquares | None,
        unpooled: Sequence[Lookup] = (),
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._table_columns = table_columns
        self._clip, self._sum_over_ranks = config.gradient_clipping, sum_over_ranks
        self._device = device
        self._sum_squares = sum_squares
        self._optimizer = ROW_OPTIMIZERS[config.optimizer]
        self._hyperparameters = Hyperparameters(config.learning_rate, config.eps)
        dtype = torch.float16 if config.weights == "fp16" else torch.float32
        kinds = itertools.groupby(shards, key=lambda local: (local.shard.columns, config.rule_of(local.shard.table)))
        self._stacks = [StackedTable(list(same), self._optimizer, rule, dtype, device) for (_, rule), same in kinds]
        self._unpooled = [
            (stack, first)  # of each slot, its stack and its shard's first row there
            for slot in unpooled
            for stack in self._stacks
            if (first := stack.first_row(slot.shard)) is not None
        ]

    @torch.no_grad()
    def rows_of(self, unpooled: Unpooled) -> list[Tensor]:
        """The rows of every unpooled slot, float32 [ids, columns]."""
        return [
            stack.rows_of(values.long() + first)
            for values, (stack, first) in zip(unpooled.values(), self._unpooled, strict=True)
        ]

    def _single(self, ids: LocalIds, stack: StackedTable) -> tuple[Tensor, Tensor] | None:
        """Keys of the rows that were looked up one by one in a stack, and their gradients; None: there are none."""
        if ids.unpooled is None or not any(stack is other for other, _ in self._unpooled):
            return None
        assert ids.unpooled.gradients is not None, "the gradients of sequences come before the update"
        parts = zip(ids.unpooled.values(), ids.unpooled.gradients, self._unpooled, strict=True)
        own = [(values.long() + first, grad) for values, grad, (other, first) in parts if other is stack]
        if len(own) == 1:
            return own[0][0], own[0][1].float()
        return torch.cat([keys for keys, _ in own]), torch.cat([grad.float() for _, grad in own])

    @torch.no_grad()
    def pool(self, ids: LocalIds) -> Pooled:
        return Pooled(self.look_up(ids), lambda gradient: self.update(ids, gradient.float()))

    def set_learning_rate(self, rate: float) -> None:
        self._hyperparameters.learning_rate = rate

    def start(self, seed: int) -> None:
        """Call it first, with the seed of the run."""
        for stack in self._stacks:
            stack.start(seed)

    def settle(self, names: Collection[str] | None = None) -> None:
        """Apply pending decay, so that the weights are up to date: of these tables
        and those that lie in one stack with them, or of all."""
        for stack in self._stacks:
            if names is None or any(local.shard.table in names for local in stack.shards):
                stack.settle()

    @property
    def decay_bytes(self) -> int:
        """Bytes of the record of pending decay."""
        return sum(stack.decay_bytes for stack in self._stacks)

    def state(self) -> State:
        named: State = {}
        for stack in self._stacks:
            named |= stack.state()
        return named

    def look_up(self, ids: LocalIds) -> Tensor:
        """Summed rows of every bag, float32 [examples, columns of all slots]."""
        outputs = [stack.look_up(part) for stack, part in zip(self._stacks, self._parts(ids), strict=True)]
        if not outputs:
            return torch.empty(ids.examples, 0, device=ids.values.device)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    @torch.no_grad()
    def update(self, ids: LocalIds, grad: Tensor) -> None:
        """One optimizer step, given the gradient float32 [examples, columns of all slots] of `look_up`."""
        columns = grad.split([stack.slots * stack.columns for stack in self._stacks], dim=1)
        gradients = [
            stack.gradients(part, own, self._single(ids, stack))
            for stack, part, own in zip(self._stacks, self._parts(ids), columns, strict=True)
        ]
        if self._clip is not None:
            clipped = [list(chunks) for chunks in gradients]
            self._clip_norm([gradient.values for chunks in clipped for gradient in chunks])
            gradients = [iter(chunks) for chunks in clipped]
        if self._optimizer.rowwise and self._sum_squares is not None:
            held = [list(chunks) for chunks in gradients]
            self._set_shared_mean_squares(held, self._sum_squares)
            gradients = [iter(chunks) for chunks in held]
        for stack, chunks in zip(self._stacks, gradients, strict=True):
            stack.begin_step(self._hyperparameters)
            for gradient in chunks:
                stack.apply(gradient, self._hyperparameters)

    def _clip_norm(self, values: Sequence[Tensor]) -> None:
        """Scale gradients to a norm over all tables of at most embedding.gradient_clipping, as torch's clip_grad_norm_;
        the host waits for nothing."""
        assert self._clip is not None
        square = torch.zeros(1, device=self._device)
        for part in values:
            square += part.square().sum()
        norm = (square if self._sum_over_ranks is None else self._sum_over_ranks(square)).sqrt()
        factor = (self._clip / (norm + 1e-6)).clamp_(max=1)
        for part in values:
            part.mul_(factor)

    def _set_shared_mean_squares(self, held: Sequence[list[RowGradient]], sum_squares: SumSquares) -> None:
        """Means of g^2 over the rows of the global tables; this rank has some of their columns."""
        partial: list[Tensor] = []
        for stack, chunks in zip(self._stacks, held, strict=True):
            if chunks:
                squares = torch.cat([gradient.values.square().sum(dim=1) for gradient in chunks])
                partial += stack.split_by_shard(
                    torch.cat([self._numbers(gradient.rows) for gradient in chunks]), squares
                )
            else:
                partial += [torch.empty(0, device=self._device)] * len(stack.shards)
        whole = [square / columns for square, columns in zip(sum_squares(partial), self._table_columns, strict=True)]
        for stack, chunks in zip(self._stacks, held, strict=True):
            means = torch.cat(whole[: len(stack.shards)]).unsqueeze(1)
            whole = whole[len(stack.shards) :]
            for gradient, mean in zip(chunks, means.split([len(g.values) for g in chunks]), strict=True):
                gradient.mean_square = mean

    def _numbers(self, rows: Tensor | slice) -> Tensor:
        return torch.arange(rows.start, rows.stop, device=self._device) if isinstance(rows, slice) else rows

    def _parts(self, ids: LocalIds) -> list[LocalIds]:
        """The ids of each stack."""
        stops = itertools.accumulate(stack.slots for stack in self._stacks)
        return [ids.part(stop - stack.slots, stop) for stack, stop in zip(self._stacks, stops, strict=True)]


class ReplicatedTorchTables(TorchTables):
    """Every rank looks up its own examples; the update first sums all ranks' gradients.

    They are few rows, so that the sum is one all-reduce of [rows, columns + 1] over all tables, in float32 whatever
    the message types; its last column counts the ranks that touched a row. Its result is the same to the last bit on
    all ranks, and so are the copies.

    Args:
        mark: takes the touched rows of an update, counted over all shards in their order.
    """

    def __init__(
        self,
        shards: Sequence[LocalShard],
        table_columns: Sequence[int],
        config: EmbeddingConfig,
        device: torch.device,
        channel: Channel,
        mark: Callable[[Tensor], None],
        unpooled: Sequence[Lookup] = (),
    ) -> None:
        super().__init__(shards, table_columns, config, device, sum_squares=None, unpooled=unpooled)
        self._channel, self._mark = channel, mark

    @torch.no_grad()
    def update(self, ids: LocalIds, grad: Tensor) -> None:
        stacks = self._stacks
        columns = grad.split([stack.slots * stack.columns for stack in stacks], dim=1)
        sizes = [stack.rows * (stack.columns + 1) for stack in stacks]
        buffer = torch.zeros(sum(sizes), device=self._device)
        own = [part.view(s.rows, s.columns + 1) for part, s in zip(buffer.split(sizes), stacks, strict=True)]
        for stack, part, of_stack, sums in zip(stacks, self._parts(ids), columns, own, strict=True):
            for rows, values in stack.touched_gradients(part, of_stack, self._single(ids, stack)):
                sums[rows, :-1] = values
                sums[rows, -1] = 1
        total = all_reduce_sum(buffer, self._channel, "gradients", "backward")
        first = 0
        for stack, flat in zip(stacks, total.split(sizes), strict=True):
            sums = flat.view(stack.rows, stack.columns + 1)
            touched = sums[:, -1].nonzero().squeeze(1)
            self._mark(touched + first)
            first += stack.rows
            gradient = stack.of_sums(touched, sums[:, :-1])
            stack.begin_step(self._hyperparameters)
            stack.apply(gradient, self._hyperparameters)


class ColumnShardSum:
    """The ranks that hold columns of each table of this rank; every rank of the channel must take part in `sum`."""

    def __init__(self, mine: Sequence[Shard], shards: Sequence[Shard], channel: Channel, device: torch.device) -> None:
        self._channel = channel
        self._device = device
        order = {table: position for position, table in enumerate(dict.fromkeys(shard.table for shard in shards))}
        self._in_table_order = sorted(range(len(mine)), key=lambda t: order[mine[t].table])
        self._owners = [
            [
                s.rank
                for s in sorted(shards, key=lambda s: s.column_start)
                if (s.table, s.row_start) == (shard.table, shard.row_start)
            ]
            for shard in mine
        ]

    def sum(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sum partial vectors over the owners of each table, in column order.

        Args:
            parts: float32 [U_t] for each table t of this rank, in the order of `mine`.
        """
        rank, ranks = self._channel.rank, range(self._channel.size)
        shared = [[t for t in self._in_table_order if r != rank and r in self._owners[t]] for r in ranks]
        sizes = [sum(parts[t].numel() for t in tables) for tables in shared]
        message = torch.cat([parts[t] for tables in shared for t in tables] or [torch.empty(0, device=self._device)])
        received = all_to_all(message, sizes, sizes, self._channel, "squares", "backward")
        from_rank = {(rank, t): part for t, part in enumerate(parts)}
        order = [(r, t) for r in ranks for t in shared[r]]
        pieces = received.split([parts[t].numel() for _, t in order])
        from_rank.update(zip(order, pieces, strict=True))
        return [torch.stack([from_rank[r, t] for r in owners]).sum(dim=0) for t, owners in enumerate(self._owners)]
