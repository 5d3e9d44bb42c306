"""The analytic cost against the modules' parameters, torch's FLOP counter, and published figures."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from megarec.config.sections import WukongConfig
from megarec.models.cost import count, count_mlp, count_wukong
from megarec.models.recommender import Recommender
from tests.models.layouts import layout
from tests.models.test_wukong import configs

BATCH = 3


@given(
    config=configs(small_mlp=[3], numeric_mlp=[4, 2], small_embeddings=2),
    full=st.lists(st.integers(1, 3), max_size=3),
    small=st.lists(st.integers(1, 3), max_size=2),
    numeric=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_counts_what_the_model_has_and_does(
    config: WukongConfig, full: list[int], small: list[int], numeric: int
) -> None:
    assume(full or small or numeric)
    places = layout(config.dim, full, small)
    model = Recommender(places, numeric, config)
    cost = count(config, places, numeric)
    assert cost.dense_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.sparse_parameters == sum(table.rows * table.columns for table in places.tables)
    assert cost.parameters == cost.dense_parameters + cost.sparse_parameters

    with FlopCounterMode(display=False) as counter:
        embedded = torch.randn(BATCH, places.width, requires_grad=True)
        model(torch.randn(BATCH, numeric), embedded).sum().backward()
    assert cost.flop * BATCH == counter.get_total_flops()
    assert cost.flop == sum(part.flop for part in cost.parts.values())


def test_parts_are_those_of_the_modules() -> None:
    config = WukongConfig(layers=3, dim=8, num_fm=4, num_lcb=3, rank=5, mlp=[16, 12], head=[9])
    places = layout(8, [1, 2, 1], [3, 4])
    parts = count(config, places, 6).parts
    owners = {
        "projection.fm": "fm",
        "fmb.mlp": "fm_mlp",
        "projection.lcb": "lcb",
        "projection.residual": "residual",
        "norm": "layer_norm",
        "head": "head",
        "small_mlp": "small_mlp",
        "numeric_mlp": "numeric_mlp",
    }
    sums = dict.fromkeys(owners.values(), 0)
    for name, parameter in Recommender(places, 6, config).named_parameters():
        (owner,) = {part for key, part in owners.items() if key in name}
        sums[owner] += parameter.numel()
    assert {name: part.parameters for name, part in parts.items() if name != "tables"} == sums


# published size -> GFLOP/example by the formula (0.0635 of it the embedding-side MLPs, whose sizes are not disclosed)
LADDER = {
    (2, 8, 24, 2048): 0.496,
    (4, 32, 24, 2048): 1.027,
    (8, 32, 24, 2048): 1.575,
    (8, 48, 48, 4096): 5.278,
    (8, 96, 96, 8192): 23.38,
    (8, 96, 96, 16384): 58.50,
    (8, 192, 192, 16384): 117.28,
}
EMBEDDING_SIDE = 0.0635


@pytest.mark.parametrize("sizes", LADDER)
def test_published_ladder_by_the_formula(sizes: tuple[int, int, int, int]) -> None:
    layers, embeddings, rank, width = sizes
    config = WukongConfig(
        dim=160, layers=layers, num_fm=embeddings, num_lcb=embeddings, rank=rank, mlp=[width] * 3, head=[2048]
    )
    gflop = sum(part.flop for part in count_wukong(723, config).values()) / 1e9
    assert gflop + EMBEDDING_SIDE == pytest.approx(LADDER[sizes], abs=0.0051 if gflop > 10 else 0.00051)


def test_mlps_of_published_models() -> None:
    """DLRM on Criteo Terabyte (4.617 MFLOP) and MLPerf's: bottom and top MLP, and 27 x 27 dot products of 128."""
    dots = 6 * 27 * 27 * 128
    bottom = count_mlp(13, [512, 256], 128, True, input_gradient=False)
    top = count_mlp(479, [512, 512], 1, True)
    assert (bottom.flop + top.flop + dots) / 1e6 == pytest.approx(4.617, abs=0.0005)

    top = count_mlp(479, [1024, 1024, 512, 256], 1, True)
    assert (bottom.flop + top.flop + dots) / 1e6 == pytest.approx(14.738, abs=0.0005)
