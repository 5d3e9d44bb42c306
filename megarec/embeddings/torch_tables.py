"""Tables in plain torch: any optimizer, any width, row-wise Adagrad over column slices."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.embeddings.ids import LocalIds
from megarec.embeddings.optimizers import ROW_OPTIMIZERS, Hyperparameters, RowGradient
from megarec.embeddings.stack import Stack
from megarec.embeddings.tables import LocalShard, State

SumSquares = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Per table of this rank: sums of squares of its touched rows over this rank's columns -> over all columns."""


class TorchTables:
    """Shards of this rank, neighbours of equal width stacked.

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
        self._table_columns = table_columns
        self._device = device
        self._sum_squares = sum_squares
        self._optimizer = ROW_OPTIMIZERS[config.optimizer]
        self._hyperparameters = Hyperparameters(config.learning_rate, config.eps)
        dtype = torch.float16 if config.weights == "fp16" else torch.float32
        self._stacks = [
            Stack(list(alike), self._optimizer, dtype, device)
            for _, alike in itertools.groupby(shards, key=lambda local: local.shard.columns)
        ]
        self._anchor = torch.empty(0, requires_grad=True)  # what makes autograd call the update

    def forward(self, ids: LocalIds) -> Tensor:
        pooled: Tensor = _LookupThenUpdate.apply(self._anchor, self, ids)
        return pooled

    def set_learning_rate(self, rate: float) -> None:
        self._hyperparameters.learning_rate = rate

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

    def update(self, ids: LocalIds, grad: Tensor) -> None:
        """One optimizer step, given the gradient [examples, columns of all slots] of `look_up`."""
        columns = grad.split([stack.slots * stack.columns for stack in self._stacks], dim=1)
        gradients = [s.gradients(p, c) for s, p, c in zip(self._stacks, self._parts(ids), columns, strict=True)]
        if self._optimizer.rowwise and self._sum_squares is not None:
            held = [list(chunks) for chunks in gradients]
            self._set_shared_mean_squares(held, self._sum_squares)
            gradients = [iter(chunks) for chunks in held]
        for stack, chunks in zip(self._stacks, gradients, strict=True):
            stack.count_step()
            for gradient in chunks:
                if self._optimizer.rowwise and gradient.mean_square is None:
                    gradient.mean_square = gradient.values.square().mean(dim=1, keepdim=True)
                stack.apply(gradient, self._hyperparameters)

    def _set_shared_mean_squares(self, held: Sequence[list[RowGradient]], sum_squares: SumSquares) -> None:
        """Means of g^2 over the rows of the global tables, of which this rank has some of the columns."""
        partial: list[Tensor] = []
        for stack, chunks in zip(self._stacks, held, strict=True):
            if chunks:
                squares = torch.cat([gradient.values.square().sum(dim=1) for gradient in chunks])
                partial += stack.split_by_shard(torch.cat([gradient.rows for gradient in chunks]), squares)
            else:
                partial += [torch.empty(0, device=self._device)] * len(stack.shards)
        whole = [square / columns for square, columns in zip(sum_squares(partial), self._table_columns, strict=True)]
        for stack, chunks in zip(self._stacks, held, strict=True):
            means = torch.cat(whole[: len(stack.shards)]).unsqueeze(1)
            whole = whole[len(stack.shards) :]
            for gradient, mean in zip(chunks, means.split([g.rows.numel() for g in chunks]), strict=True):
                gradient.mean_square = mean

    def _parts(self, ids: LocalIds) -> list[LocalIds]:
        """The ids of each stack."""
        stops = itertools.accumulate(stack.slots for stack in self._stacks)
        return [ids.part(stop - stack.slots, stop) for stack, stop in zip(self._stacks, stops, strict=True)]


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
