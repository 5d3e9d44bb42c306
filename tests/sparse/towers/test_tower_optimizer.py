"""What the tower_module section leaves open is as in `dense`."""

import pytest
import torch
from torch import nn

from megarec.config.sections import DenseConfig
from megarec.config.towers import DcnTowerConfig
from megarec.sparse.towers.replicas import TowerOptimizer, build_optimizer, resolve_optimizer

DENSE = DenseConfig(optimizer="sgd", learning_rate=0.3, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.1)


def test_open_keys_follow_dense_and_zero_is_not_open() -> None:
    module = DcnTowerConfig(name="dcn", compression=2)
    assert resolve_optimizer(module, DENSE) == TowerOptimizer("sgd", 0.3, (0.5, 0.6), 1e-3, 0.1)
    own = DcnTowerConfig(name="dcn", compression=2, optimizer="adamw", learning_rate=0.0, weight_decay=0.0, eps=0.5)
    assert resolve_optimizer(own, DENSE) == TowerOptimizer("adamw", 0.0, (0.5, 0.6), 0.5, 0.0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_first_step_is_that_of_the_formula(name: str) -> None:
    wish = TowerOptimizer(name, 0.1, (0.9, 0.99), 1e-2, 0.2)
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    weight.grad = torch.tensor([[0.5, 0.02]])
    before, g = weight.detach().clone(), weight.grad.clone()
    build_optimizer([weight], wish).step()
    if name == "sgd":
        expected = before - 0.1 * (g + 0.2 * before)
    else:  # after the bias correction of the first step the moments are g and g^2
        expected = before * (1 - 0.1 * 0.2) - 0.1 * g / (g.abs() + 1e-2)
    torch.testing.assert_close(weight.detach(), expected)
