"""Tower modules against their equations, written plainly in float64: values and gradients."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarec.config.towers import DcnTowerConfig, DlrmTowerConfig, TowerModule, WukongTowerConfig
from megarec.models.initial import initialize
from megarec.sparse.towers.modules import TowerModules, build_tower
from megarec.sparse.towers.sizes import TowerSizes, module_sizes
from tests.models.equations import Parameters, assert_same, mlp, randomise

small = st.integers(1, 3)


@st.composite
def modules(draw: st.DrawFn) -> TowerModule:
    """Sections with every size given."""
    dim = draw(st.integers(1, 4) | st.none())
    match draw(st.sampled_from(["dlrm", "dcn", "wukong"])):
        case "dlrm":
            c = draw(st.integers(0, 3))
            return DlrmTowerConfig(name="dlrm", c=c, p=draw(st.integers(0 if c else 1, 2)), dim=dim)
        case "dcn":
            sizes = {"embeddings": draw(small), "layers": draw(small), "rank": draw(small | st.none())}
            return DcnTowerConfig(name="dcn", dim=dim, **sizes)
        case _:
            sizes = {"num_fm": draw(small), "num_lcb": draw(small), "rank": draw(small)}
            return WukongTowerConfig(name="wukong", dim=dim, mlp=draw(st.lists(small, max_size=2)), **sizes)


@st.composite
def all_sizes(draw: st.DrawFn) -> TowerSizes:
    """Sizes of one to four uneven towers."""
    inputs = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    return module_sizes(draw(modules()), draw(st.integers(1, 4)), inputs, draw(st.booleans()))[0]


def linear(x: Tensor, p: Parameters, name: str) -> Tensor:
    return torch.einsum("...i,oi->...o", x, p[f"{name}.linears.0.weight"]) + p.get(f"{name}.linears.0.bias", 0)


def layer_norm(x: Tensor, p: Parameters, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * p[f"{name}.weight"] + p.get(f"{name}.bias", 0)


def dlrm(x: Tensor, p: Parameters, module: DlrmTowerConfig, dim: int) -> Tensor:
    batch = len(x)
    out = [linear(x.reshape(batch, -1), p, "whole").reshape(batch, module.c, dim)] if module.c else []
    if module.p:
        out += [linear(x[:, i], p, "each").reshape(batch, module.p, dim) for i in range(x.shape[1])]
    return torch.cat(out, dim=1)


def dcn(x: Tensor, p: Parameters, module: DcnTowerConfig, dim: int) -> Tensor:
    first = x = x.reshape(len(x), -1)
    for i in range(module.layers):
        product = p[f"layers.{i}.product.linears.0.weight"]
        if module.rank is not None:
            product = p[f"layers.{i}.product.linears.1.weight"] @ product
        x = first * (torch.einsum("oi,bi->bo", product, x) + p.get(f"layers.{i}.bias", 0)) + x
    return linear(x, p, "projection").reshape(len(x), module.embeddings, dim)


def wukong(x: Tensor, p: Parameters, module: WukongTowerConfig, dim: int) -> Tensor:
    batch, _, width = x.shape
    y = p["interaction.projection.fm"]  # Y^T
    fm = x @ (x.transpose(1, 2) @ y.T)
    fmb = mlp(layer_norm(fm.reshape(batch, -1), p, "interaction.fmb.norm"), p, "interaction.fmb.mlp")
    lcb = torch.einsum("ln,bnd->bld", p["interaction.projection.lcb"], x)
    residual = p.get("interaction.projection.residual")
    kept = x if residual is None else torch.einsum("ln,bnd->bld", residual, x)
    both = torch.cat([fmb.reshape(batch, module.num_fm, width), lcb], dim=1) + kept
    out = layer_norm(both, p, "interaction.norm")
    return out if dim == width else linear(out, p, "projection")


EQUATIONS = {"dlrm": dlrm, "dcn": dcn, "wukong": wukong}


def tower_equation(x: Tensor, p: Parameters, sizes: TowerSizes) -> Tensor:
    return EQUATIONS[sizes.module.name](x, p, sizes.module, sizes.dim)


@given(sizes=all_sizes(), seed=st.integers(0, 1000))
@settings(max_examples=120, deadline=None)
def test_values_and_gradients(sizes: TowerSizes, seed: int) -> None:
    torch.manual_seed(seed)
    tower = build_tower(sizes, 0)
    x = randomise(tower, sizes.inputs[0], sizes.width)
    assert tower(x).shape == (len(x), sizes.outputs[0], sizes.dim)
    assert_same(tower, lambda x, p: tower_equation(x, p, sizes), x)
    assert sizes.bias or not [name for name, _ in tower.named_parameters() if "bias" in name]


def bank_parameters(bank: TowerModules, tower: int) -> Parameters:
    prefix = f"towers.{tower}."
    return {name.removeprefix(prefix): p for name, p in bank.named_parameters() if name.startswith(prefix)}


@given(sizes=all_sizes(), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_bank_runs_each_tower_on_its_own_columns(sizes: TowerSizes, seed: int) -> None:
    torch.manual_seed(seed)
    bank = TowerModules(sizes, range(len(sizes.inputs)))
    randomise(bank, 1, 1)
    widths = [features * sizes.width for features in sizes.inputs]
    x = torch.randn(3, sum(widths), dtype=torch.float64)
    expected, start = [], 0
    for tower, width in enumerate(widths):
        block = x[:, start : start + width].reshape(3, -1, sizes.width)
        expected.append(tower_equation(block, bank_parameters(bank, tower), sizes).reshape(3, -1))
        start += width
    torch.testing.assert_close(bank(x), torch.cat(expected, dim=1))
    assert sizes.output_columns(range(len(widths))) == bank(x).shape[1]


@given(sizes=all_sizes(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_part_of_the_towers_is_that_part_of_all(sizes: TowerSizes, data: st.DataObject) -> None:
    """First weights and results of a host's towers are those of one process with all towers."""
    count = len(sizes.inputs)
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first, count - 1))
    whole, part = TowerModules(sizes, range(count)), TowerModules(sizes, range(first, last + 1))
    initialize(whole, 7)
    initialize(part, 7)
    names = dict(whole.named_parameters())
    assert all(torch.equal(names[name], parameter) for name, parameter in part.named_parameters())

    columns = [features * sizes.width for features in sizes.inputs]
    x = torch.randn(5, sum(columns))
    own = x[:, sum(columns[:first]) : sum(columns[: last + 1])]
    before, here = sizes.output_columns(range(first)), sizes.output_columns(range(first, last + 1))
    torch.testing.assert_close(part(own), whole(x)[:, before : before + here])


@pytest.mark.parametrize("name", ["dlrm", "dcn", "wukong"])
def test_towers_start_differently_and_of_unit_scale(name: str) -> None:
    """Unit variance in, about unit variance out of every module (a cross layer doubles it); no two towers are alike."""
    module = {
        "dlrm": DlrmTowerConfig(name="dlrm", c=4, p=1, dim=16),
        "dcn": DcnTowerConfig(name="dcn", embeddings=8, dim=16),
        "wukong": WukongTowerConfig(name="wukong", num_fm=4, num_lcb=4, dim=16),
    }[name]
    sizes, _ = module_sizes(module, 32, [10, 10], bias=True)
    bank = TowerModules(sizes, [0, 1])
    initialize(bank, 1)
    matrices = [name for name, p in bank.named_parameters() if p.dim() == 2 and name.startswith("towers.0.")]
    weights = dict(bank.named_parameters())
    assert matrices
    assert not any(torch.equal(weights[m], weights[m.replace("towers.0.", "towers.1.")]) for m in matrices)
    assert 0.5 < bank(torch.randn(2000, 640)).var() < 3


def shapes(bank: TowerModules) -> Sequence[tuple[int, ...]]:
    return [tuple(p.shape) for p in bank.parameters()]


def test_a_dlrm_tower_shares_one_map_over_its_embeddings() -> None:
    """p is a map of the width alone: its parameters do not grow with the tower."""
    module = DlrmTowerConfig(name="dlrm", c=0, p=2, dim=3)
    few, many = (TowerModules(module_sizes(module, 4, [count], bias=True)[0], [0]) for count in (1, 9))
    assert shapes(few) == shapes(many) == [(6, 4), (6,)]
