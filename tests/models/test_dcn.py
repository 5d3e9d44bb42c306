"""DCNv2 against its equations, written plainly in float64: values and gradients of the input and every parameter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megarec.config.models import DcnConfig
from megarec.models.blocks import MLP
from megarec.models.dcn import Dcn
from tests.models.equations import Parameters, assert_same, mlp, randomise

size = st.integers(1, 4)


@st.composite
def configs(draw: st.DrawFn, **fixed: object) -> DcnConfig:
    drawn = {
        "name": "dcn",
        "dim": draw(size),
        "layers": draw(st.integers(1, 3)),
        "rank": draw(size | st.none()),
        "head": draw(st.lists(size, max_size=2)),
        "bias": draw(st.booleans()),
        "structure": draw(st.sampled_from(["stacked", "parallel"])),
    }
    return DcnConfig.model_validate(drawn | fixed)


def dcn(x: Tensor, p: Parameters, config: DcnConfig) -> Tensor:
    """The equations of the paper: x_{l+1} = x_0 * (W x_l + b) + x_l, or with U V in W's place; MLP behind or beside."""
    first = x = x.reshape(len(x), -1)
    for i in range(config.layers):
        product = p[f"layers.{i}.product.linears.0.weight"]
        if config.rank is not None:
            product = p[f"layers.{i}.product.linears.1.weight"] @ product
        x = first * (torch.einsum("oi,bi->bo", product, x) + p.get(f"layers.{i}.bias", 0)) + x
    if config.structure == "parallel":
        return (mlp(first, p, "head") + torch.einsum("oi,bi->bo", p["linear.linears.0.weight"], x)).reshape(-1)
    return mlp(x, p, "head").reshape(-1)


@given(n=st.integers(1, 4), config=configs(), seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_values_and_gradients(n: int, config: DcnConfig, seed: int) -> None:
    torch.manual_seed(seed)
    model = Dcn(n, config)
    x = randomise(model, n, config.dim)
    assert_same(model, lambda x, p: dcn(x, p, config), x)


@given(config=configs(bias=False))
@settings(max_examples=20, deadline=None)
def test_without_bias_no_parameter_is_one(config: DcnConfig) -> None:
    assert not [name for name, _ in Dcn(3, config).named_parameters() if "bias" in name]


@pytest.mark.parametrize("rank", [6, None])
def test_every_product_is_an_mlp(rank: int | None) -> None:
    """So tensor parallelism finds them all: it replaces each MLP of a model."""
    model = Dcn(3, DcnConfig(name="dcn", dim=4, layers=2, rank=rank))
    inside = {linear for mlp in model.modules() if isinstance(mlp, MLP) for linear in mlp.linears}
    assert inside == {module for module in model.modules() if isinstance(module, nn.Linear)}
    assert [tuple(p.shape) for name, p in model.named_parameters() if name.endswith("bias")][:2] == [(12,), (12,)]


def test_a_cross_layer_starts_near_unit_variance() -> None:
    """Unit variance in: the product W x has unit variance, low rank or full; biases start at 0."""
    torch.manual_seed(0)
    for rank in (None, 200):
        layer = Dcn(20, DcnConfig(name="dcn", dim=20, layers=1, rank=rank)).layers[0]
        product = layer.product(torch.randn(500, 400))
        assert abs(product.var() - 1) < 6 * math.sqrt(2 / 200)
        assert layer.bias.abs().max() == 0
