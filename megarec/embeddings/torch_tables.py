"""Tables in plain torch: any optimizer, any width, row-wise Adagrad over column slices; also the check on FBGEMM."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from megarec.config.sections import EmbeddingConfig
from megarec.embeddings.ids import LocalIds
from megarec.embeddings.optimizers import ROW_OPTIMIZERS, Hyperparameters, RowGradient
from megarec.embeddings.tables import LocalShard, State

SumSquares = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Sums of squares of each table's unique rows over this rank's columns -> over all columns."""


class TorchTables:
    """Shards of this rank.

    Args:
        table_columns: columns of each shard's whole table.
        sum_squares: sums partial squares over the owners of a table (co_owners.py); None: every shard has whole rows.
    """

    def __init__(
        self,
        shards: Sequence[LocalShard],
        table_columns: Sequence[int],
        config: EmbeddingConfig,
        device: torch.device,
        sum_squares: SumSquares | None,
    ) -> None:
        self._shards = shards
        self._table_columns = table_columns
        self._sum_squares = sum_squares
        self._optimizer = ROW_OPTIMIZERS[config.optimizer]
        self._hyperparameters = Hyperparameters(config.learning_rate, config.eps)
        dtype = torch.float16 if config.weights == "fp16" else torch.float32
        self._weights = [
            torch.empty(local.shard.rows, local.shard.columns, dtype=dtype, device=device) for local in shards
        ]
        self._states = [self._optimizer.new_state(weight) for weight in self._weights]
        self._anchor = torch.empty(0, requires_grad=True)  # what makes autograd call the update

    def forward(self, ids: LocalIds) -> Tensor:
        pooled: Tensor = _LookupThenUpdate.apply(self._anchor, self, ids)
        return pooled

    def set_learning_rate(self, rate: float) -> None:
        self._hyperparameters.learning_rate = rate

    def state(self) -> State:
        named: State = {}
        for local, weight, state in zip(self._shards, self._weights, self._states, strict=True):
            shard = local.shard
            slices = {"element": shard, "row": shard.per_row, "table": shard.per_table}
            named[f"{shard.table}/weight"] = (shard, weight)
            for name, tensor in state.items():
                named[f"{shard.table}/{name}"] = (slices[self._optimizer.state[name]], tensor)
        return named

    def look_up(self, ids: LocalIds) -> Tensor:
        """Summed rows of every bag, float32 [examples, columns of all slots]."""
        columns = sum(local.shard.columns * len(local.slots) for local in self._shards)
        out = torch.empty(ids.examples, columns, device=ids.values.device)
        for local, weight, part, target in self._each(ids, out):
            pooled = _pool(weight, part) if local.jagged else weight.index_select(0, part.values)
            target.copy_(pooled.view(len(local.slots), ids.examples, -1).transpose(0, 1))
        return out

    def update(self, ids: LocalIds, grad: Tensor) -> None:
        """One optimizer step, given the gradient [examples, columns of all slots] of `look_up`."""
        gradients = [_row_gradient(local, part, target) for local, _, part, target in self._each(ids, grad)]
        if self._optimizer.rowwise:
            self._add_mean_squares(gradients)
        for weight, state, gradient in zip(self._weights, self._states, gradients, strict=True):
            change = self._optimizer.update(state, gradient, self._hyperparameters)
            new = weight.index_select(0, gradient.rows) + change
            weight.index_copy_(0, gradient.rows, new.to(weight.dtype))

    def _add_mean_squares(self, gradients: Sequence[RowGradient]) -> None:
        squares: Sequence[Tensor] = [gradient.values.square().sum(dim=1) for gradient in gradients]
        if self._sum_squares is not None:
            squares = self._sum_squares(squares)
        for gradient, square, columns in zip(gradients, squares, self._table_columns, strict=True):
            gradient.mean_square = (square / columns).unsqueeze(1)

    def _each(self, ids: LocalIds, matrix: Tensor) -> Iterator[tuple[LocalShard, Tensor, LocalIds, Tensor]]:
        """Shard, weight, its ids, and its columns of `matrix` as a view [examples, slots, columns of the shard]."""
        slot, column = 0, 0
        for local, weight in zip(self._shards, self._weights, strict=True):
            slots, columns = len(local.slots), local.shard.columns
            view = matrix[:, column : column + slots * columns].unflatten(1, (slots, columns))
            yield local, weight, ids.part(slot, slot + slots), view
            slot, column = slot + slots, column + slots * columns


class _LookupThenUpdate(torch.autograd.Function):
    """Forward looks up; the backward pass is the optimizer step."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tables: TorchTables, ids: LocalIds) -> Tensor:
        ctx.tables, ctx.ids = tables, ids
        return tables.look_up(ids)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.tables.update(ctx.ids, grads[0])
        return None, None, None


def _pool(weight: Tensor, ids: LocalIds) -> Tensor:
    """Sum the rows of every bag in float32: [bags, columns]."""
    if weight.dtype == torch.float32:
        return embedding_bag(ids.values, weight, ids.offsets, mode="sum", include_last_offset=True)
    rows = weight.index_select(0, ids.values).float()
    positions = torch.arange(rows.shape[0], dtype=ids.offsets.dtype, device=rows.device)
    return embedding_bag(positions, rows, ids.offsets, mode="sum", include_last_offset=True)


def _row_gradient(local: LocalShard, ids: LocalIds, grad: Tensor) -> RowGradient:
    """Sum the gradients of every occurrence of a row, in the order of the global batch.

    The sum over the occurrences of a row is itself a bag: a table of gradients, looked up at the bags where the row
    occurs. It is as fast as a lookup and, unlike scattered additions, has a fixed order on every device.

    Args:
        grad: [examples, slots, columns].
    """
    by_bag = grad.transpose(0, 1).reshape(-1, local.shard.columns)
    if ids.values.numel() == 0:
        return RowGradient(ids.values.long(), by_bag[:0])
    in_order, bags = ids.values.sort(stable=True)
    rows, counts = in_order.unique_consecutive(return_counts=True)
    if local.jagged:
        bag_of_value = torch.arange(by_bag.shape[0], device=grad.device).repeat_interleave(ids.offsets.diff().long())
        bags = bag_of_value[bags]
    return RowGradient(rows.long(), embedding_bag(bags, by_bag, counts.cumsum(0) - counts, mode="sum"))
