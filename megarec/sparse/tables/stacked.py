"""Shards of equal width stacked in one tensor: one lookup, one sort and few operations for all of them.

A row of the stack has a key: the shard's first row plus the id. Keys of different shards never meet, so that one sort
finds the unique touched rows of every table at once.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from megarec.sparse.placement import Shard
from megarec.sparse.tables.base import LocalIds, LocalShard, State
from megarec.sparse.tables.optimizers import Hyperparameters, RowGradient, RowOptimizer

CPU_CHUNK = 4096  # touched rows that are updated at a time, so that their gradients stay in the cache


class StackedTable:
    """Weights and optimizer state of shards of this rank that have the same number of columns.

    Args:
        shards: neighbours in the order of slots.
    """

    def __init__(
        self, shards: Sequence[LocalShard], optimizer: RowOptimizer, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shards = shards
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

    def first_row(self, shard: Shard) -> int | None:
        """Of a shard's rows in the stack; None: it is in another."""
        for local, stop in zip(self.shards, self._stops, strict=True):
            if local.shard == shard:
                return stop - shard.rows
        return None

    def rows_of(self, keys: Tensor) -> Tensor:
        """These rows, float32 [keys, columns]."""
        return self._weight.index_select(0, keys).float()

    def look_up(self, ids: LocalIds) -> Tensor:
        """Summed rows of every bag, float32 [examples, slots x columns]."""
        if not self.slots:
            return self._weight.new_empty(ids.examples, 0, dtype=torch.float32)
        keys = self._keys(ids)
        if self._jagged:
            bags = self._pool(keys, ids.offsets.long(), ids.weights).view(self.slots, ids.examples, self.columns)
            return bags.transpose(0, 1).reshape(ids.examples, -1)
        keys = keys.view(self.slots, ids.examples).T.reshape(-1)  # in the order of the output
        return self._weight.index_select(0, keys).to(torch.float32).view(ids.examples, -1)

    def gradients(
        self, ids: LocalIds, grad: Tensor, single: tuple[Tensor, Tensor] | None = None
    ) -> Iterator[RowGradient]:
        """Gradients of the touched rows (by key, ascending), chunk by chunk.

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
            yield RowGradient(rows[start:stop], summed)

    def apply(self, gradient: RowGradient, hyperparameters: Hyperparameters) -> None:
        """Update the rows of one chunk; `count_step` comes before the first of a step."""
        change = self._optimizer.update(self._state, gradient, hyperparameters, int(self._steps[0]))
        if self._weight.dtype == torch.float32:
            self._weight.index_add_(0, gradient.rows, change)
        else:
            new = self._weight.index_select(0, gradient.rows) + change
            self._weight.index_copy_(0, gradient.rows, new.to(self._weight.dtype))

    def count_step(self) -> None:
        self._steps += 1

    def split_by_shard(self, rows: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Cut `values`, one for each of the ascending `rows` of a step, into those of each shard."""
        stops = torch.searchsorted(rows, self._stops_on_device).tolist()
        return values.split([stop - start for start, stop in itertools.pairwise([0, *stops])])

    def state(self) -> State:
        named: State = {}
        for index, (local, stop) in enumerate(zip(self.shards, self._stops, strict=True)):
            shard = local.shard
            rows = slice(stop - shard.rows, stop)
            named[f"{shard.table}/weight"] = (shard, self._weight[rows])
            for name, tensor in self._state.items():
                place = shard if self._optimizer.state[name] == "element" else shard.per_row
                named[f"{shard.table}/{name}"] = (place, tensor[rows])
            if self._optimizer.counts_steps:
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
        if weight.dtype != torch.float32:
            weight = weight.index_select(0, keys).float()
            keys = torch.arange(keys.numel(), device=keys.device)
        return embedding_bag(keys, weight, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
