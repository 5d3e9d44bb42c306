"""Shards of equal width and rule stacked in one tensor: one lookup, one sort and few operations for all of them.

A row of the stack has a key: the shard's first row plus the id. Keys of different shards differ, so that one sort
finds the unique touched rows of every table at once.

Decay of rows that no batch looks up is lazy. A row's decay over some steps is the product of 1 - rate x decay of each,
whatever its rate. The stack sums their logarithms over all steps, each row keeps the sum up to
which its weights are decayed, and the rest is applied to what is read and at a row's next update; `settle` applies it
to all rows, before weights are saved.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from megarec.config.regularisation import TableRule
from megarec.sparse.placement import Shard
from megarec.sparse.tables.base import LocalIds, LocalShard, State
from megarec.sparse.tables.optimizers import GPU_CELLS, Hyperparameters, RowGradient, RowOptimizer
from megarec.sparse.tables.stochastic import Rounding

CPU_CHUNK = 4096  # touched rows that are updated at a time, so that their gradients stay in the cache
CPU_CELLS = 2**19  # of neighbours that are: 2 MiB of weights, gradient and each state; fewer cost their calls


class LazyDecay:
    """How far the rows of a stack are decayed.

    Attributes:
        total: sum of log(1 - rate x decay) over the steps so far, in float64 as the rows' own.
        done: float64 [rows, 1], the sum up to which each row is decayed.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.total = 0.0
        self.done = torch.zeros(rows, 1, dtype=torch.float64, device=device)

    def pending(self, rows: Tensor | slice) -> Tensor:
        """Float32 [rows, 1]: the pending factors of the weights of these rows."""
        return (self.total - _taken(self.done, rows)).exp_().float()

    def settled(self, rows: Tensor) -> Tensor:
        """`pending`, for the last time."""
        factor = self.pending(rows)
        self.done.index_fill_(0, rows, self.total)
        return factor

    def forget(self) -> None:
        """Start from here: all rows are decayed."""
        self.total = 0.0
        self.done.zero_()


def _taken(tensor: Tensor, rows: Tensor | slice) -> Tensor:
    """A copy of these rows; of neighbours, the rows themselves."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


class StackedTable:
    """Weights and optimizer state of shards of this rank that have the same number of columns.

    Args:
        shards: neighbours in the order of slots.
        rule: of all their tables.
    """

    def __init__(
        self,
        shards: Sequence[LocalShard],
        optimizer: RowOptimizer,
        rule: TableRule,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shards = shards
        self._rule = rule
        self._update = optimizer.of_all_rows if rule.all_rows and optimizer.of_all_rows else optimizer.update
        self.slots = sum(len(local.slots) for local in shards)
        self.columns = shards[0].shard.columns
        self._optimizer = optimizer
        rows = [local.shard.rows for local in shards]
        self.rows = sum(rows)
        self._stops = list(itertools.accumulate(rows))
        self._stops_on_device = torch.tensor(self._stops, device=device)
        first_rows = [stop - own for stop, own in zip(self._stops, rows, strict=True)]
        self._first_rows = torch.tensor(
            [first for first, local in zip(first_rows, shards, strict=True) for _ in local.slots],
            dtype=torch.int64,
            device=device,
        )
        self._jagged = any(local.jagged for local in shards)
        self._weight = torch.empty(sum(rows), self.columns, dtype=dtype, device=device)
        self._state = optimizer.new_state(self._weight)
        self._steps = torch.zeros(len(shards), 1, dtype=torch.int64)  # updates so far, of every shard
        self._chunk = CPU_CHUNK if device.type == "cpu" else sum(rows)
        self._neighbours = max(1, (CPU_CELLS if device.type == "cpu" else GPU_CELLS) // self.columns)
        self._decay = LazyDecay(self.rows, device) if rule.lazy_decay else None
        self._rounding: Rounding | None = None

    def first_row(self, shard: Shard) -> int | None:
        """Of a shard's rows in the stack; None: it is in another."""
        for local, stop in zip(self.shards, self._stops, strict=True):
            if local.shard == shard:
                return stop - shard.rows
        return None

    def rows_of(self, keys: Tensor) -> Tensor:
        """These rows, float32 [keys, columns]."""
        rows = self._weight.index_select(0, keys).float()
        return rows if self._decay is None else rows.mul_(self._decay.pending(keys))

    def look_up(self, ids: LocalIds) -> Tensor:
        """Summed rows of every bag, float32 [examples, slots x columns]."""
        if not self.slots:
            return self._weight.new_empty(ids.examples, 0, dtype=torch.float32)
        keys = self._keys(ids)
        if self._jagged:
            bags = self._pool(keys, ids.offsets.long(), ids.weights).view(self.slots, ids.examples, self.columns)
            return bags.transpose(0, 1).reshape(ids.examples, -1)
        keys = keys.view(self.slots, ids.examples).T.reshape(-1)  # in the order of the output
        return self.rows_of(keys).view(ids.examples, -1)

    def gradients(
        self, ids: LocalIds, grad: Tensor, single: tuple[Tensor, Tensor] | None = None
    ) -> Iterator[RowGradient]:
        """Gradients of the rows that a step updates (by key, ascending), chunk by chunk; L2 is in them.

        Args:
            grad: float32 [examples, slots x columns], of the result of `look_up`.
            single: as in `touched_gradients`.
        """
        touched = self.touched_gradients(ids, grad, single)
        if not self._rule.all_rows:
            yield from itertools.starmap(RowGradient, touched)
            return
        found = list(touched) or [(self._first_rows[:0], self._weight[:0].float())]
        rows, values = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
        starts = range(0, self.rows, self._neighbours)
        firsts = [0, rows.numel()]
        if len(starts) > 1:
            firsts[1:1] = torch.searchsorted(rows, torch.tensor(starts[1:], device=rows.device)).tolist()
        for start, (first, last) in zip(starts, itertools.pairwise(firsts), strict=True):
            own = slice(start, min(start + self._neighbours, self.rows))
            whole = self._l2_gradient(own)
            whole.index_add_(0, rows[first:last] - start, values[first:last])
            yield RowGradient(own, whole)

    def of_sums(self, touched: Tensor, sums: Tensor) -> RowGradient:
        """The gradient of a step, from float32 sums for every row [rows, columns], 0 where none is touched."""
        if self._rule.all_rows:
            return RowGradient(slice(0, self.rows), sums + self._l2_gradient(slice(0, self.rows)))
        return RowGradient(touched, sums[touched].contiguous())

    def _l2_gradient(self, rows: slice) -> Tensor:
        """Float32 [rows, columns]: what L2 on all rows adds to the gradient of these."""
        weight = self._weight[rows]
        if not self._rule.coupled:
            return torch.zeros_like(weight, dtype=torch.float32)
        return weight * self._rule.coupled if weight.dtype == torch.float32 else weight.float().mul_(self._rule.coupled)

    def touched_gradients(
        self, ids: LocalIds, grad: Tensor, single: tuple[Tensor, Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Touched rows (by key, ascending) and the sums of their gradients, chunk by chunk, without L2.

        Every occurrence of a row counts, in the order of slots and then of the global batch, single ones last. The
        sum over the occurrences is itself a bag, of rows of `grad`: as fast as a lookup, and, unlike scattered
        additions, in a fixed order on every device.

        Args:
            grad: float32 [examples, slots x columns], of the result of `look_up`.
            single: keys of rows that were looked up one by one, and their gradients, float32 [keys, columns].
        """
        grad = grad.reshape(-1, self.columns)  # row e x slots + s is that of example e, slot s
        keys, occurrences, weights = self._keys(ids), self._gradient_rows(ids), ids.weights
        if single is not None:
            more = torch.arange(grad.shape[0], grad.shape[0] + single[0].numel(), device=grad.device)
            keys, occurrences = torch.cat([keys, single[0]]), torch.cat([occurrences, more])
            grad = torch.cat([grad, single[1]])
            weights = None if weights is None else torch.cat([weights, weights.new_ones(more.numel())])
        in_order, order = keys.sort(stable=True)
        rows, counts = in_order.unique_consecutive(return_counts=True)
        occurrences = occurrences.index_select(0, order)
        weights = None if weights is None else weights.index_select(0, order)
        stops = counts.cumsum(0)
        total, touched = occurrences.numel(), rows.numel()
        for start in range(0, touched, self._chunk):
            stop = min(start + self._chunk, touched)
            first = int(stops[start - 1]) if start else 0
            last = int(stops[stop - 1]) if stop < touched else total
            offsets = (stops[start:stop] - counts[start:stop]) - first
            own = None if weights is None else weights[first:last]
            summed = embedding_bag(occurrences[first:last], grad, offsets, mode="sum", per_sample_weights=own)
            yield rows[start:stop], summed

    def apply(self, gradient: RowGradient, hyperparameters: Hyperparameters) -> None:
        """Update the rows of one chunk; `begin_step` comes before the first of a step."""
        rows = gradient.rows
        if self._optimizer.rowwise and gradient.mean_square is None:
            gradient.mean_square = gradient.values.square().mean(dim=1, keepdim=True)
        state = {name: _taken(tensor, rows) for name, tensor in self._state.items()}
        change = self._update(state, gradient, hyperparameters, int(self._steps[0]))
        if not isinstance(rows, slice):
            for name, tensor in self._state.items():
                tensor.index_copy_(0, rows, state[name])
            if self._weight.dtype == torch.float32 and self._decay is None:
                self._weight.index_add_(0, rows, change)
                return
        weight = _taken(self._weight, rows).float()  # float32 neighbours: the weights themselves
        if self._decay is not None and not isinstance(rows, slice):
            weight.mul_(self._decay.settled(rows))
        elif self._rule.decay:
            weight.mul_(1 - hyperparameters.learning_rate * self._rule.decay)
        weight.add_(change)
        if not isinstance(rows, slice) or self._weight.dtype != torch.float32:
            self._set(rows, weight, 2 * int(self._steps[0]))

    def begin_step(self, hyperparameters: Hyperparameters) -> None:
        """Count a step whose updates are applied; the same on every rank, whether it has ids or not."""
        self._steps += 1
        if self._decay is not None:
            self._decay.total += math.log1p(-hyperparameters.learning_rate * self._rule.decay)

    def settle(self) -> None:
        """Apply pending decay to all rows."""
        if self._decay is None or not self._decay.total:
            return
        for start in range(0, self.rows, self._neighbours):
            rows = slice(start, min(start + self._neighbours, self.rows))
            decayed = self._weight[rows].float().mul_(self._decay.pending(rows))  # float32: the weights themselves
            if self._weight.dtype != torch.float32:
                self._set(rows, decayed, 2 * int(self._steps[0]) + 1)
        self._decay.forget()

    def _set(self, rows: Tensor | slice, values: Tensor, draw: int) -> None:
        """Store float32 weights of some rows; `draw`: of stochastic rounding, another one every time."""
        if self._rounding is not None:
            values = self._rounding.round(values, rows, draw)
        if isinstance(rows, slice):
            self._weight[rows].copy_(values)
        else:
            self._weight.index_copy_(0, rows, values.to(self._weight.dtype))

    def split_by_shard(self, rows: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Cut `values`, one for each of the ascending `rows` of a step, into those of each shard."""
        stops = torch.searchsorted(rows, self._stops_on_device).tolist()
        return values.split([stop - start for start, stop in itertools.pairwise([0, *stops])])

    def start(self, seed: int) -> None:
        """Call it first, with the seed of the run."""
        if self._rule.stochastic:
            self._rounding = Rounding([local.shard for local in self.shards], seed, self._weight.device)

    @property
    def decay_bytes(self) -> int:
        """Bytes of the record of pending decay."""
        return 0 if self._decay is None else self._decay.done.nbytes

    def state(self) -> State:
        named: State = {}
        for index, (local, stop) in enumerate(zip(self.shards, self._stops, strict=True)):
            shard = local.shard
            rows = slice(stop - shard.rows, stop)
            named[f"{shard.table}/weight"] = (shard, self._weight[rows])
            for name, tensor in self._state.items():
                place = shard if self._optimizer.state[name] == "element" else shard.per_row
                named[f"{shard.table}/{name}"] = (place, tensor[rows])
            if self._optimizer.counts_steps or self._rule.stochastic:
                named[f"{shard.table}/steps"] = (shard.per_table, self._steps[index : index + 1])
        return named

    def _keys(self, ids: LocalIds) -> Tensor:
        """int64, in the order of `ids.values`."""
        counts = ids.counts_on_device()
        return self._first_rows.repeat_interleave(counts, output_size=ids.values.numel()).add_(ids.values)

    def _gradient_rows(self, ids: LocalIds) -> Tensor:
        """For every value, the row of `grad` (see `gradients`) of its bag."""
        slots, examples = (torch.arange(n, device=ids.values.device) for n in (self.slots, ids.examples))
        of_bag = (slots.unsqueeze(1) + self.slots * examples).view(-1)
        if not self._jagged:
            return of_bag
        return of_bag.repeat_interleave(ids.offsets.diff().long(), output_size=ids.values.numel())

    def _pool(self, keys: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """Sum the rows of every bag, times their weights, in float32: [bags, columns]."""
        weight = self._weight
        if self._decay is not None:
            kept = self._decay.pending(keys).squeeze(1)
            weights = kept if weights is None else kept.mul_(weights)
        if weight.dtype != torch.float32:
            weight = weight.index_select(0, keys).float()
            keys = torch.arange(keys.numel(), device=keys.device)
        return embedding_bag(keys, weight, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
