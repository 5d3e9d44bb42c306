"""Optimizers over rows of a table, touched ones or all, in torch, float32 whatever the stored type of the weights.

Each runs once a step on the gradient that was summed over the whole global batch before ("exact").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megarec.config.sections import EmbeddingConfig
from megarec.sparse.placement import Shard

ADAM_BETAS = (0.9, 0.999)
GPU_CELLS = 2**24  # of a table whose every row is updated, that are updated at a time on an accelerator


@dataclass
class Hyperparameters:
    """What an update needs besides the gradient; the rate may change between steps."""

    learning_rate: float
    eps: float


@dataclass
class RowGradient:
    """The gradient of some rows of a table; an update may overwrite `values`.

    Attributes:
        rows: int64 [U], unique; or neighbours.
        values: float32 [U, columns], summed over the global batch.
        mean_square: float32 [U, 1], mean of the squared gradient over the global row; None unless a row-wise
            optimizer asks for it.
    """

    rows: Tensor | slice
    values: Tensor
    mean_square: Tensor | None = None


RowUpdate = Callable[[dict[str, Tensor], RowGradient, Hyperparameters, int], Tensor]
"""Updates these rows of the state in place, given how many steps there were, this one included; returns the change of
the weights' rows, [U, columns]."""


def sgd(state: dict[str, Tensor], gradient: RowGradient, h: Hyperparameters, step: int) -> Tensor:
    """w -= rate g."""
    return gradient.values.mul_(-h.learning_rate)


def adagrad(state: dict[str, Tensor], gradient: RowGradient, h: Hyperparameters, step: int) -> Tensor:
    """s += g^2; w -= rate g / (sqrt(s) + eps)."""
    g = gradient.values
    square_sum = state["square_sum"].addcmul_(g, g)
    return g.div_(square_sum.sqrt().add_(h.eps)).mul_(-h.learning_rate)


def rowwise_adagrad(state: dict[str, Tensor], gradient: RowGradient, h: Hyperparameters, step: int) -> Tensor:
    """s += mean(g^2) over the row, one number a row; w -= rate g / (sqrt(s) + eps)."""
    assert gradient.mean_square is not None
    square_sum = state["rowwise_square_sum"].add_(gradient.mean_square)
    return gradient.values.mul_(-h.learning_rate / square_sum.sqrt().add_(h.eps))


def _moments(state: dict[str, Tensor], g: Tensor) -> tuple[Tensor, Tensor]:
    beta1, beta2 = ADAM_BETAS
    return state["first_moment"].lerp_(g, 1 - beta1), state["second_moment"].mul_(beta2).addcmul_(g, g, value=1 - beta2)


def adam(state: dict[str, Tensor], gradient: RowGradient, h: Hyperparameters, step: int) -> Tensor:
    """torch.optim.SparseAdam: the moments of touched rows move; bias correction by the global step."""
    first, second = _moments(state, gradient.values)
    beta1, beta2 = ADAM_BETAS
    rate = h.learning_rate * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    return first.div(second.sqrt().add_(h.eps)).mul_(-rate)


def dense_adam(state: dict[str, Tensor], gradient: RowGradient, h: Hyperparameters, step: int) -> Tensor:
    """torch.optim.Adam: `eps` is added to the corrected moment's root."""
    first, second = _moments(state, gradient.values)
    beta1, beta2 = ADAM_BETAS
    root = torch.sqrt(second, out=gradient.values).div_((1 - beta2**step) ** 0.5).add_(h.eps)
    return torch.div(first, root, out=root).mul_(-h.learning_rate / (1 - beta1**step))


@dataclass(frozen=True)
class RowOptimizer:
    """An update and the state it keeps: by name, a number per element or per row.

    Attributes:
        counts_steps: whether the update depends on the number of steps.
        of_all_rows: the update of tables whose every row is updated at every step, if it is another.
    """

    update: RowUpdate
    state: dict[str, Literal["element", "row"]]
    counts_steps: bool = False
    of_all_rows: RowUpdate | None = None

    @property
    def rowwise(self) -> bool:
        """Whether the update looks at whole rows of the global table."""
        return "row" in self.state.values()

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """Zeros, float32: [rows, columns] or [rows, 1]."""
        rows, columns = weight.shape
        return {
            name: torch.zeros(rows, columns if per == "element" else 1, device=weight.device)
            for name, per in self.state.items()
        }


ROW_OPTIMIZERS = {
    "sgd": RowOptimizer(sgd, {}),
    "adagrad": RowOptimizer(adagrad, {"square_sum": "element"}),
    "rowwise_adagrad": RowOptimizer(rowwise_adagrad, {"rowwise_square_sum": "row"}),
    "adam": RowOptimizer(
        adam, {"first_moment": "element", "second_moment": "element"}, counts_steps=True, of_all_rows=dense_adam
    ),
}


def whole_update_bytes(shards: Sequence[Shard], config: EmbeddingConfig) -> int:
    """Memory of updates of all rows beside the tables, at most, on an accelerator: the gradient of a piece of them, and
    as much again for a root or a change."""
    cells = sum(shard.rows * shard.columns for shard in shards if config.rule_of(shard.table).all_rows)
    return 2 * 4 * min(cells, GPU_CELLS)


def table_bytes(shards: Sequence[Shard], config: EmbeddingConfig) -> int:
    """Weights, optimizer state, the flags of touched rows and how far lazily decaying rows are, of some shards."""
    width = 2 if config.weights == "fp16" else 4
    state = ROW_OPTIMIZERS[config.optimizer].state.values()
    per_element, per_row = (sum(4 for kept in state if kept == per) for per in ("element", "row"))
    decay = {table: 8 * config.rule_of(table).lazy_decay for table in {shard.table for shard in shards}}
    return sum(s.rows * (s.columns * (width + per_element) + per_row + 1 + decay[s.table]) for s in shards)
