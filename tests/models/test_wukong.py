"""Wukong against its equations, written plainly in float64: values and gradients of the input and every parameter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megarec.config.models import AttentiveConfig, WukongConfig
from megarec.errors import UserError
from megarec.models.blocks import KeyedDropout
from megarec.models.wukong import Projection, Wukong
from tests.models.equations import Parameters, assert_same, mlp, randomise

size = st.integers(1, 4)


@st.composite
def configs(draw: st.DrawFn, **fixed: object) -> WukongConfig:
    layers = draw(st.integers(1, 3))
    per_layer = size | st.lists(size, min_size=layers, max_size=layers)
    widths = st.lists(size, max_size=2)
    drawn = {
        "dim": draw(size),
        "layers": layers,
        "num_fm": draw(per_layer),
        "num_lcb": draw(per_layer),
        "rank": draw(per_layer),
        "mlp": draw(widths | st.lists(widths, min_size=layers, max_size=layers)),
        "fm": draw(st.sampled_from(["optimized", "full"])),
        "projection": draw(st.sampled_from(["static", "attentive"])),
        "attentive": AttentiveConfig(compressed=draw(size), mlp=draw(widths)),
        "head": draw(widths),
        "bias": draw(st.booleans()),
    }
    return WukongConfig.model_validate(drawn | fixed)


def of_layer(sizes: int | list[int], layer: int) -> int:
    return sizes[layer] if isinstance(sizes, list) else sizes


def layer_norm(x: Tensor, p: Parameters, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return normed * p[f"{name}.weight"] + p.get(f"{name}.bias", 0)


def wukong(x: Tensor, p: Parameters, config: WukongConfig) -> Tensor:
    """The equations of the paper; n embeddings enter a layer, n' leave it."""
    for i in range(config.layers):
        batch, n, d = x.shape
        layer = f"layers.{i}"
        if config.fm == "full":
            fm = torch.einsum("bnd,bmd->bnm", x, x)
        elif config.projection == "static":
            fm = torch.einsum("bnd,bmd,km->bnk", x, x, p[f"{layer}.projection.fm"])
        else:
            compressed = torch.einsum("cn,bnd->bcd", p[f"{layer}.projection.fm"], x)
            y = mlp(compressed.reshape(batch, -1), p, f"{layer}.fmb.attention")
            fm = torch.einsum("bnd,bmd,bmk->bnk", x, x, y.reshape(batch, n, of_layer(config.rank, i)))
        normed = layer_norm(fm.reshape(batch, -1), p, f"{layer}.fmb.norm")
        fmb = mlp(normed, p, f"{layer}.fmb.mlp").reshape(batch, of_layer(config.num_fm, i), d)
        lcb = torch.einsum("ln,bnd->bld", p[f"{layer}.projection.lcb"], x)
        both = torch.cat([fmb, lcb], dim=1)
        residual = x if both.shape[1] == n else torch.einsum("mn,bnd->bmd", p[f"{layer}.projection.residual"], x)
        x = layer_norm(both + residual, p, f"{layer}.norm")
    return mlp(x.reshape(len(x), -1), p, "head").reshape(-1)


def randomised(n: int, config: WukongConfig, seed: int) -> tuple[Wukong, Tensor]:
    """A model in float64 whose every parameter is random (gains and biases too), and an input."""
    torch.manual_seed(seed)
    model = Wukong(n, config)
    return model, randomise(model, n, config.dim)


@given(n=st.integers(1, 6), config=configs(), seed=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_values_and_gradients(n: int, config: WukongConfig, seed: int) -> None:
    model, x = randomised(n, config, seed)
    assert_same(model, lambda x, p: wukong(x, p, config), x)


@pytest.mark.parametrize(
    ("sizes", "seed"),
    [
        ({"layers": 2, "num_fm": 1, "head": [3]}, 1),
        ({"layers": 3, "num_fm": 2, "head": [3]}, 346),
        ({"layers": 3, "num_fm": 1, "head": [], "mlp": [2]}, 2),
    ],
)
def test_rounding_that_layer_norm_amplifies(sizes: dict, seed: int) -> None:
    """A LayerNorm over one number: gradients that are 0 were off by 1e-7; a model that is wrong is still seen."""
    config = WukongConfig.model_validate(
        {"dim": 4, "num_lcb": 1, "rank": 1, "mlp": [], "projection": "attentive", "bias": False, **sizes}
        | {"attentive": AttentiveConfig(compressed=2, mlp=[])}
    )
    model, x = randomised(1, config, seed)
    assert_same(model, lambda x, p: wukong(x, p, config), x)
    with pytest.raises(AssertionError, match="off by up to"):
        assert_same(model, lambda x, p: wukong(x * (1 + 1e-3), p, config), x)


@pytest.mark.parametrize("projection", ["static", "attentive"])
def test_gradcheck(projection: str) -> None:
    config = WukongConfig.model_validate(
        {"dim": 3, "layers": 2, "num_fm": 2, "num_lcb": 1, "rank": 2, "mlp": [4], "head": [3], "projection": projection}
    )
    model, x = randomised(4, config, seed=0)
    assert torch.autograd.gradcheck(model, (x,))


@given(config=configs(bias=False))
@settings(max_examples=20, deadline=None)
def test_without_bias_no_parameter_is_one(config: WukongConfig) -> None:
    assert not [name for name, _ in Wukong(3, config).named_parameters() if "bias" in name]


def test_only_a_change_of_n_compresses_the_residual() -> None:
    model = Wukong(8, WukongConfig(layers=3, dim=4, num_fm=[4, 4, 2], num_lcb=[4, 4, 2], mlp=[8]))
    assert [layer.projection.residual is None for layer in model.layers] == [True, True, False]


def test_optimized_fm_with_the_identity_is_the_full_one() -> None:
    sizes = {"dim": 4, "layers": 1, "num_fm": 2, "num_lcb": 3, "rank": 5, "mlp": [6], "head": []}
    optimized, x = randomised(5, WukongConfig.model_validate(sizes), seed=1)
    full, _ = randomised(5, WukongConfig.model_validate(sizes | {"fm": "full"}), seed=1)
    state = optimized.state_dict()
    state["layers.0.projection.fm"].copy_(torch.eye(5))
    full.load_state_dict({name: value for name, value in state.items() if name != "layers.0.projection.fm"})
    torch.testing.assert_close(optimized(x), full(x))


@pytest.mark.parametrize(
    ("key", "value"), [("num_fm", [1, 2]), ("num_lcb", [1]), ("rank", [1, 2, 3, 4]), ("mlp", [[8], [8]])]
)
def test_a_list_of_the_wrong_length_is_a_user_error(key: str, value: list) -> None:
    config = WukongConfig.model_validate({"layers": 3, key: value})
    with pytest.raises(UserError, match=rf"model\.{key} has sizes for {len(value)} layers, but model\.layers=3"):
        Wukong(5, config)


def test_projection_initialisation_follows_the_true_fan_in() -> None:
    torch.manual_seed(0)
    model = Wukong(700, WukongConfig(layers=2, dim=4, num_fm=100, num_lcb=100, rank=90, mlp=[4], head=[4]))
    for layer, n in zip(model.layers, (700, 200), strict=True):
        for weight in layer.projection.parameters():
            assert weight.shape[1] == n
            assert abs(weight.var() * n - 1) < 6 * math.sqrt(2 / weight.numel())


def test_signals_keep_their_size_through_the_layers() -> None:
    """Unit variance in: every projection's output has unit variance, whatever n is."""
    torch.manual_seed(0)
    for n in (10, 1000):
        (parts,) = Projection(n, lcb=50, fm=60, residual=70)(torch.randn(100, n, 8))
        for part, width in zip(parts.values(), (50, 60, 70), strict=True):
            assert part.shape == (100, width, 8)
            assert abs(part.var() - 1) < 0.2


def test_layer_norm_is_injected() -> None:
    made = []

    def layer_norm(width: int, bias: bool) -> nn.Module:
        made.append((width, bias))
        return nn.LayerNorm(width, bias=bias)

    config = WukongConfig(layers=2, dim=4, num_fm=2, num_lcb=1, rank=3, mlp=[8], bias=False)
    Wukong(5, config, layer_norm)
    assert made == [(15, False), (4, False), (9, False), (4, False)]


def test_dropout_masks_follow_the_examples_and_differ_between_layers() -> None:
    torch.manual_seed(0)
    config = WukongConfig(layers=2, dim=4, num_fm=2, num_lcb=2, rank=3, mlp=[16, 16], head=[16], dropout=0.5)
    model = Wukong(4, config).double()
    dropouts = [module for module in model.modules() if isinstance(module, KeyedDropout)]
    assert sorted(dropout.salt for dropout in dropouts) == list(range(5))
    x, keys = torch.randn(12, 4, 4, dtype=torch.float64), torch.arange(12)
    whole = model(x, keys)
    order = torch.tensor([7, 2, 9])
    torch.testing.assert_close(model(x[order], keys[order]), whole[order])
    assert not torch.allclose(model(x, keys + 1), whole)
    assert not torch.allclose(model.eval()(x), whole)


def test_a_meta_model_costs_nothing() -> None:
    with torch.device("meta"):
        model = Wukong(723, WukongConfig(dim=160, layers=8, num_fm=192, num_lcb=192, rank=192, mlp=[16384] * 3))
    assert sum(parameter.numel() for parameter in model.parameters()) > 17e9
    assert model(torch.empty(2, 723, 160, device="meta")).shape == (2,)
