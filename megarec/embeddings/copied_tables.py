"""Copies of tables on every rank of a group, in plain torch: one identical update of all of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.embeddings.ids import LocalIds
from megarec.embeddings.optimizers import RowGradient
from megarec.embeddings.tables import LocalShard
from megarec.embeddings.torch_tables import TorchTables
from megarec.parallel.collectives import Channel, all_reduce_sum


class CopiedTables(TorchTables):
    """Every rank looks up its own examples; the update first sums all ranks' gradients.

    They are few rows, so that the sum is one all-reduce of [rows, columns + 1] over all tables, in float32 whatever
    the message types; its last column counts the ranks that touched a row. Its result is the same to the last bit on
    all ranks, hence so are the copies.

    Args:
        mark: is told the touched rows of an update, counted over all shards in their order.
    """

    def __init__(
        self,
        shards: Sequence[LocalShard],
        table_columns: Sequence[int],
        config: EmbeddingConfig,
        device: torch.device,
        channel: Channel,
        mark: Callable[[Tensor], None],
    ) -> None:
        super().__init__(shards, table_columns, config, device, sum_squares=None)
        self._channel, self._mark = channel, mark

    def update(self, ids: LocalIds, grad: Tensor) -> None:
        stacks = self._stacks
        columns = grad.split([stack.slots * stack.columns for stack in stacks], dim=1)
        sizes = [stack.rows * (stack.columns + 1) for stack in stacks]
        buffer = torch.zeros(sum(sizes), device=self._device)
        own = [part.view(s.rows, s.columns + 1) for part, s in zip(buffer.split(sizes), stacks, strict=True)]
        for stack, part, of_stack, sums in zip(stacks, self._parts(ids), columns, own, strict=True):
            for gradient in stack.gradients(part, of_stack):
                sums[gradient.rows, :-1] = gradient.values
                sums[gradient.rows, -1] = 1
        total = all_reduce_sum(buffer, self._channel, "gradients", "backward")
        first = 0
        for stack, flat in zip(stacks, total.split(sizes), strict=True):
            sums = flat.view(stack.rows, stack.columns + 1)
            rows = sums[:, -1].nonzero().squeeze(1)
            self._mark(rows + first)
            first += stack.rows
            gradient = RowGradient(rows, sums[rows, :-1].contiguous())
            if self._optimizer.rowwise:
                gradient.mean_square = gradient.values.square().mean(dim=1, keepdim=True)
            stack.count_step()
            stack.apply(gradient, self._hyperparameters)
