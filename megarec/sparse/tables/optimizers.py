"""Optimizers over the touched rows of a table, written out in torch, float32 whatever the weights are stored in.

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


@dataclass
class Hyperparameters:
    """What an update needs to know beside the gradient; the rate may change between steps."""

    learning_rate: float
    eps: float


@dataclass
class RowGradient:
    """The gradient of a table's touched rows; an update may overwrite `values`.

    Attributes:
        rows: int64 [U], unique.
        values: float32 [U, columns], summed over the global batch.
        mean_square: float32 [U, 1], mean of the squared gradient over the global row; None unless a row-wise
            optimizer asks for it.
    """

    rows: Tensor
    values: Tensor
    mean_square: Tensor | None = None


RowUpdate = Callable[[dict[str, Tensor], RowGradient, Hyperparameters, int], Tensor]
"""Updates the state's rows, given how many steps there were, this one included; returns the change of the weights'
rows, [U, columns]."""


def sgd(state: dict[str, Tensor], gradient: RowGradient, h: Hyperparameters, step: int) -> Tensor:
    """w -= rate g."""
    return gradient.values.mul_(-h.learning_rate)


def adagrad(state: dict[str, Tensor], gradient: RowGradient, h: Hyperparameters, step: int) -> Tensor:
    """s += g^2; w -= rate g / (sqrt(s) + eps)."""
    rows, g = gradient.rows, gradient.values
    square_sum = state["square_sum"].index_select(0, rows).addcmul_(g, g)
    state["square_sum"].index_copy_(0, rows, square_sum)
    return g.div_(square_sum.sqrt_().add_(h.eps)).mul_(-h.learning_rate)


def rowwise_adagrad(state: dict[str, Tensor], gradient: RowGradient, h: Hyperparameters, step: int) -> Tensor:
    """s += mean(g^2) over the row, one number a row; w -= rate g / (sqrt(s) + eps)."""
    assert gradient.mean_square is not None
    square_sum = state["rowwise_square_sum"].index_select(0, gradient.rows).add_(gradient.mean_square)
    state["rowwise_square_sum"].index_copy_(0, gradient.rows, square_sum)
    return gradient.values.mul_(-h.learning_rate / square_sum.sqrt_().add_(h.eps))


def adam(state: dict[str, Tensor], gradient: RowGradient, h: Hyperparameters, step: int) -> Tensor:
    """torch.optim.SparseAdam: the moments of touched rows move; bias correction by the global step."""
    rows, g = gradient.rows, gradient.values
    beta1, beta2 = ADAM_BETAS
    first = state["first_moment"].index_select(0, rows).lerp_(g, 1 - beta1)
    second = state["second_moment"].index_select(0, rows).mul_(beta2).addcmul_(g, g, value=1 - beta2)
    state["first_moment"].index_copy_(0, rows, first)
    state["second_moment"].index_copy_(0, rows, second)
    rate = h.learning_rate * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    return first.div_(second.sqrt_().add_(h.eps)).mul_(-rate)


@dataclass(frozen=True)
class RowOptimizer:
    """An update and the state it keeps: by name, a number per element or per row.

    Attributes:
        counts_steps: whether the update depends on the number of steps.
    """

    update: RowUpdate
    state: dict[str, Literal["element", "row"]]
    counts_steps: bool = False

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
    "adam": RowOptimizer(adam, {"first_moment": "element", "second_moment": "element"}, counts_steps=True),
}


def table_bytes(shards: Sequence[Shard], config: EmbeddingConfig) -> int:
    """Weights, optimizer state and the flags of touched rows of some shards."""
    width = 2 if config.weights == "fp16" else 4
    state = ROW_OPTIMIZERS[config.optimizer].state.values()
    per_element, per_row = (sum(4 for kept in state if kept == per) for per in ("element", "row"))
    return sum(shard.rows * (shard.columns * (width + per_element) + per_row + 1) for shard in shards)
