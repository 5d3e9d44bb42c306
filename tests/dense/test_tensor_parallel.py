"""Tensor-parallel MLPs against the whole MLP on one process: outputs, gradients, FLOPs, kept activations."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megarec.config.models import WukongConfig
from megarec.dense.memory import saved_activations
from megarec.dense.tensor_parallel import TensorParallelMLP, is_sharded, shard_mlps
from megarec.distributed.collectives import Channel, Ledger, all_reduce_mean_
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.models.blocks import MLP, number_dropouts
from megarec.models.initial import initialize, materialize
from megarec.models.wukong import Wukong
from megarec.slices import shard_of

EXAMPLES = 12  # of the whole batch: 6 a rank on two ranks, 3 on four
CPU = torch.device("cpu")


def channel() -> Channel:
    size = dist.get_world_size()
    return Channel("tensor", dist.group.WORLD if size > 1 else None, dist.get_rank(), size, Ledger())


def the_mlp(hidden: list[int], options: dict[str, Any]) -> nn.Sequential:
    """One MLP inside a container, as it stands in a model."""
    model = nn.Sequential(MLP(10 if not hidden else 12, hidden, 5, **options))
    number_dropouts(model)
    return model


def examples(model: nn.Sequential) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mlp = model[0]
    inputs = mlp.linears[0].in_features if isinstance(mlp, MLP) else 12  # type: ignore[union-attr]
    x = torch.randn(EXAMPLES, int(inputs), dtype=torch.float64, generator=generator)  # type: ignore[call-overload]
    upstream = torch.randn(EXAMPLES, 5, dtype=torch.float64, generator=generator)
    return x, upstream, torch.arange(100, 100 + EXAMPLES)


def of_the_group(hidden: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """Runs on every rank of one tensor group: its own examples' results, and its parameters' gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with torch.device("meta"):
        model = the_mlp(hidden, options)
    x, upstream, keys = (whole.chunk(size)[rank] for whole in examples(model))
    shard_mlps(model, channel())
    materialize(model, CPU)
    initialize(model, seed=1)
    model.double()
    x = x.clone().requires_grad_()
    y = model[0](x, keys)
    ((y * upstream).sum() / len(x)).backward()  # a rank's loss is the mean over its own examples
    replicated = [p.grad for p in model.parameters() if p.grad is not None and not is_sharded(p)]
    all_reduce_mean_(replicated, channel(), "replicated gradients", "backward")
    gradients = {}
    for name, parameter in model.named_parameters():
        start, shape = shard_of(parameter).start, parameter.shape
        slices = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        gradients[name] = (slices, parameter.grad)
    return {"y": y.detach(), "dx": x.grad, "gradients": gradients, "sharded": isinstance(model[0], TensorParallelMLP)}


CASES = [
    (list(hidden), options)
    for hidden, options in itertools.product(
        ([8], [8, 4], [8, 8, 4], [4, 8, 8, 4]),
        ({}, {"bias": False}, {"dropout": 0.4, "activation": "silu"}, {"bias": False, "relu": False}),
    )
]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("hidden", "options"), CASES, ids=str)
def test_outputs_and_gradients_are_those_of_the_whole_mlp(
    hidden: list[int], options: dict[str, Any], size: int, rank_pool: Callable[[int], RankPool]
) -> None:
    model = the_mlp(hidden, options)
    initialize(model, seed=1)
    model.double()
    x, upstream, keys = examples(model)
    x.requires_grad_()
    y = model[0](x, keys)
    ((y * upstream).sum() / EXAMPLES).backward()

    ranks = rank_pool(size).run(of_the_group, hidden, options)
    assert all(rank["sharded"] for rank in ranks)
    torch.testing.assert_close(torch.cat([rank["y"] for rank in ranks]), y.detach())
    # A rank's loss is a mean over EXAMPLES / size examples.
    torch.testing.assert_close(torch.cat([rank["dx"] for rank in ranks]) / size, x.grad)
    for name, parameter in model.named_parameters():
        for rank in ranks:
            slices, gradient = rank["gradients"][name]
            assert parameter.grad is not None
            torch.testing.assert_close(gradient, parameter.grad[slices], msg=lambda text, n=name: f"{n}: {text}")


def single_linear(inputs: int) -> bool:
    model = nn.Sequential(MLP(inputs, [], 6))
    shard_mlps(model, channel())
    return isinstance(model[0], TensorParallelMLP)


def test_a_single_layer_is_sharded_where_its_inputs_divide(rank_pool: Callable[[int], RankPool]) -> None:
    assert rank_pool(2).run(single_linear, 14) == [True, True]
    assert rank_pool(2).run(single_linear, 13) == [False, False]


CONFIG = WukongConfig(dim=16, layers=3, num_fm=8, num_lcb=8, rank=8, mlp=[64, 64, 64], head=[64], dropout=0.1)
EMBEDDINGS, BATCH = 24, 8


def dense_step(tensor: bool) -> dict[str, int]:
    """FLOPs and kept activations of one rank's forward and backward pass over BATCH examples of its own."""
    with torch.device("meta"):
        model = Wukong(EMBEDDINGS, CONFIG)
    if tensor:
        shard_mlps(model, channel())
    materialize(model, CPU)
    initialize(model, seed=1)
    x = torch.randn(BATCH, EMBEDDINGS, CONFIG.dim, requires_grad=True)
    kept: dict[str, int] = {}
    counter = FlopCounterMode(display=False)
    with counter:
        with saved_activations(kept):
            logits = model(x, torch.arange(BATCH))
        logits.sum().backward()
    parameters = sum(p.numel() for p in model.parameters())
    return {"flop": counter.get_total_flops(), "kept": kept["bytes"], "parameters": parameters}


@pytest.mark.parametrize("size", [2, 4])
def test_no_rank_computes_or_keeps_what_another_did(size: int, rank_pool: Callable[[int], RankPool]) -> None:
    """A tensor group of T ranks has T x BATCH examples; its total work over T is the work of BATCH whole examples."""
    whole = dense_step(tensor=False)
    for rank in rank_pool(size).run(dense_step, True):
        assert abs(rank["flop"] / whole["flop"] - 1) < 0.03
        assert rank["kept"] < 1.02 * whole["kept"] + 8 * size * BATCH * 10  # the group's dropout keys, 8 bytes each
        assert rank["parameters"] < whole["parameters"] / size * 1.2  # the projections stay whole


def marks() -> dict[str, bool]:
    model = Wukong(EMBEDDINGS, CONFIG)
    shard_mlps(model, channel())
    return {name: is_sharded(p) for name, p in model.named_parameters()}


def test_sharded_parameters_carry_deepspeeds_mark_and_no_other(rank_pool: Callable[[int], RankPool]) -> None:
    for name, marked in rank_pool(2).run(marks)[0].items():
        in_mlp = ".linears." in name
        row_bias = name.endswith(".bias") and int(name.split(".")[-2]) % 2 == 1 if in_mlp else False
        assert marked == (in_mlp and not row_bias), name


def wrong_width() -> str:
    try:
        shard_mlps(Wukong(EMBEDDINGS, CONFIG.model_copy(update={"mlp": [64, 30]})), channel())
    except UserError as error:
        return str(error)
    return ""


def test_a_width_that_does_not_divide_is_named_with_what_would(rank_pool: Callable[[int], RankPool]) -> None:
    for message in rank_pool(4).run(wrong_width):
        assert "parallel.tensor=4" in message and "width 30" in message and "layers.0.fmb.mlp" in message
        assert "28 or 32" in message
