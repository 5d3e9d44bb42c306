"""The optimizer of tower modules: outside the DeepSpeed engine, by default with the over-arch's hyper-parameters."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from megarec.config.sections import DenseConfig
from megarec.config.tower_sections import TowerModule


class TowerOptimizer(NamedTuple):
    """Every hyper-parameter explicit; names as in the `dense` section. Gradients are not clipped."""

    optimizer: Literal["adamw", "sgd"]
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def resolve_optimizer(module: TowerModule, dense: DenseConfig) -> TowerOptimizer:
    """What the module's section leaves open is as in `dense`."""
    wished = {name: getattr(module, name) for name in TowerOptimizer._fields}
    return TowerOptimizer(**{name: getattr(dense, name) if wish is None else wish for name, wish in wished.items()})


def build_optimizer(parameters: Iterable[nn.Parameter], wish: TowerOptimizer) -> torch.optim.Optimizer:
    """torch's own SGD or fused AdamW, at the base learning rate (the schedule scales it before each step)."""
    if wish.optimizer == "sgd":
        return torch.optim.SGD(parameters, wish.learning_rate, weight_decay=wish.weight_decay)
    return torch.optim.AdamW(
        parameters, wish.learning_rate, betas=wish.betas, eps=wish.eps, weight_decay=wish.weight_decay, fused=True
    )


def states_of(wish: TowerOptimizer) -> dict[str, Tensor]:
    """What such an optimizer keeps, once it has stepped, of a parameter of shape [1]; a number of no dimension is one
    for the whole parameter."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = build_optimizer([parameter], wish)
    optimizer.step()
    return dict(optimizer.state[parameter])
