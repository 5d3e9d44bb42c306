"""Compiled interaction layers: the same losses as one process, and clear refusals."""

from typing import Any

import pytest
import torch

from megarec.config.models import DcnConfig, WukongConfig
from megarec.config.sections import DenseConfig
from megarec.dense.layers import compile_layers
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.models import projection
from megarec.models.recommender import build_over_arch
from megarec.models.wukong import Wukong
from megarec.parity.cases import COMPILE, Case
from megarec.parity.run import run_matrix

WUKONG = WukongConfig(dim=4, layers=2, num_fm=3, num_lcb=2, rank=2, mlp=[8], head=[8])
COMPILED = DenseConfig(compile=True)


def compiled_layers(config: WukongConfig | DcnConfig, stage: int) -> None:
    model = build_over_arch(6, 1, config)
    compile_layers(model, COMPILED, {"zero_optimization": {"stage": stage}}, torch.device("cpu"))


def test_zero_3_is_refused() -> None:
    with pytest.raises(UserError, match=r"dense\.compile=true with deepspeed\.zero_optimization\.stage=3"):
        compiled_layers(WUKONG, 3)


def test_a_model_without_interaction_layers_is_refused() -> None:
    with pytest.raises(UserError, match="this model has none"):
        compiled_layers(DcnConfig(name="dcn", dim=4, rank=3, head=[8]), 1)


def test_a_machine_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="'no-such-compiler' \\(CXX\\) on PATH"):
        compiled_layers(WUKONG, 1)


def test_off_changes_nothing() -> None:
    model = build_over_arch(6, 1, WUKONG)
    compile_layers(model, DenseConfig(), {"zero_optimization": {"stage": 3}}, torch.device("cpu"))
    assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize("variant", [{}, {"fm": "full"}, {"projection": "attentive"}, {"bias": False}], ids=str)
def test_an_accelerator_sees_a_layer_as_one_graph(variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward pass without a graph break, and the numbers of the layer as it is; no code is generated."""
    monkeypatch.setattr(projection, "in_blocks", lambda x: False)
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = Wukong(7, WUKONG.model_copy(update={**variant, "dropout": 0.1})).layers[0].double()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for function in (layer, compiled):
        x = torch.linspace(-1, 1, 3 * 7 * 4, dtype=torch.float64).view(3, 7, 4).requires_grad_()
        y = function(x, torch.arange(3))
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for plain, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.slow
def test_compiled_layers_train_as_one_process_does() -> None:
    """That they were compiled, and not run as they are: dynamo counts the graphs."""
    with RankPool(1) as pool:
        assert pool.run(graphs_of_a_step)[0] > 0
    topology = ("parallel.tensor=2", "deepspeed.zero_optimization.stage=1", COMPILE)
    assert all(result.passed for result in run_matrix([Case(2, topology=topology)]))


def graphs_of_a_step() -> int:
    model = Wukong(6, WUKONG)
    compile_layers(model, COMPILED, {}, torch.device("cpu"))
    model(torch.randn(3, 6, 4), torch.arange(3)).sum().backward()
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
