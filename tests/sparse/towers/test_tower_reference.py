"""The one-process reference with towers: what it computes, and what moves its loss curve."""

from pathlib import Path

import pytest
import torch

from megarec.config.load import load_config
from megarec.data.schema import load_schema
from megarec.parity.reference import PlainTowers, reference_losses, reference_steps
from megarec.parity.run import write_base
from megarec.sparse.layout import build_layout
from megarec.sparse.towers.sizes import resolve_towers

FULL_WIDTH = 'embedding.features={"single_1": {"embeddings": 2}}'
MODULES = {
    "dlrm": '{"name": "dlrm", "c": 1, "p": 1, "dim": 8}',
    "dcn": '{"name": "dcn", "compression": 2}',
    "wukong": '{"name": "wukong", "compression": 2, "mlp": [8]}',
}
STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("towers"))


def losses(base: Path, *overrides: str) -> list[float]:
    return reference_losses(load_config(base, list(overrides)), STEPS)


def test_towers_without_modules_change_nothing(base: Path) -> None:
    assert losses(base, "parallel.towers=3") == losses(base)


@pytest.mark.parametrize("name", MODULES)
def test_modules_train_with_their_own_optimizer(name: str, base: Path) -> None:
    module = [FULL_WIDTH, "parallel.towers=2", f"tower_module={MODULES[name]}"]
    curve = losses(base, *module)
    assert curve == losses(base, *module)
    assert len(set(curve)) == STEPS and curve != losses(base, FULL_WIDTH)
    still = losses(base, *module, "tower_module.optimizer=sgd", "tower_module.learning_rate=0.0")
    assert still[0] == curve[0] and still[-1] != curve[-1]  # the modules themselves learn
    assert losses(base, *module, "parallel.towers=3")[0] != curve[0]  # the towers are part of the model


@pytest.mark.parametrize("name", MODULES)
def test_a_step_is_plain_sgd_on_the_unclipped_gradient(name: str, base: Path) -> None:
    overrides = [FULL_WIDTH, "parallel.towers=2", f"tower_module={MODULES[name]}"]
    config = load_config(base, [*overrides, "tower_module.optimizer=sgd", "tower_module.learning_rate=0.5"])
    layout = build_layout(load_schema(Path(config.data.path)), config.embedding, config.model.dim)
    towers = PlainTowers(config, layout, resolve_towers(config, layout))
    assert towers.bank is not None
    before = {key: p.detach().clone() for key, p in towers.bank.named_parameters()}
    towers.forward(torch.randn(6, layout.width)).square().sum().backward()
    gradients = {key: p.grad.clone() for key, p in towers.bank.named_parameters() if p.grad is not None}
    towers.update()
    assert before.keys() == gradients.keys()
    for key, parameter in towers.bank.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[key] - 0.5 * gradients[key])
        assert parameter.grad is None


def test_the_gradient_norm_is_that_of_the_over_arch_alone(base: Path) -> None:
    """However fast the tower modules learn, the first step's norm is the same and the modules are not clipped."""
    module = [FULL_WIDTH, "parallel.towers=2", f"tower_module={MODULES['dlrm']}", "tower_module.optimizer=sgd"]
    slow, fast = (
        reference_steps(load_config(base, [*module, f"tower_module.learning_rate={rate}"]), 2) for rate in (0.0, 1.0)
    )
    assert slow[0] == fast[0] and slow[1].loss != fast[1].loss
