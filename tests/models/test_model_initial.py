"""First weights are the same numbers for every shard, and distributed as the layers ask."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megarec.config.models import BASELINES, DcnConfig, DlrmConfig, FinalMlpConfig, OverArchConfig, WukongConfig
from megarec.models.blocks import MLP
from megarec.models.initial import TILE, draw_normal_, fill_initial, initialize, materialize
from megarec.models.recommender import build_over_arch
from megarec.slices import ParameterShard

ROWS, COLUMNS = TILE[0] + 9, TILE[1] + 12


def whole(seed: int = 1, name: str = "layers.0.weight") -> torch.Tensor:
    weight = torch.empty(ROWS, COLUMNS)
    draw_normal_(weight, 0.5)
    fill_initial(weight, name, seed)
    return weight


@settings(deadline=None, max_examples=40)
@given(
    rows=st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).map(sorted),
    columns=st.tuples(st.integers(0, COLUMNS), st.integers(0, COLUMNS)).map(sorted),
)
def test_a_shard_starts_as_its_slice_of_the_whole(rows: list[int], columns: list[int]) -> None:
    part = torch.empty(rows[1] - rows[0], columns[1] - columns[0])
    part.initial_std = 0.5  # type: ignore[attr-defined]
    part.shard = ParameterShard((ROWS, COLUMNS), (rows[0], columns[0]))  # type: ignore[attr-defined]
    fill_initial(part, "layers.0.weight", 1)
    torch.testing.assert_close(part, whole()[slice(*rows), slice(*columns)], rtol=0, atol=0)


def test_no_two_tiles_are_alike() -> None:
    """Rows below and columns beside a tile's edge start other tiles, and the threads write each to its own place."""
    weight, (rows, columns) = whole(), TILE
    starts = [weight[row : row + 5, column : column + 5] for row in (0, rows) for column in (0, columns)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(starts, 2))
    assert weight.unique().numel() > 0.9 * weight.numel()


def test_the_number_of_threads_changes_nothing() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = whole()
        torch.set_num_threads(3)
        torch.testing.assert_close(whole(), one, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


def test_seed_and_name_draw_other_numbers() -> None:
    assert not torch.equal(whole(), whole(seed=2))
    assert not torch.equal(whole(), whole(name="layers.1.weight"))


@pytest.mark.parametrize(
    "config",
    [
        WukongConfig(dim=4, layers=2, num_fm=3, num_lcb=2, rank=2, mlp=[8], head=[8]),
        DlrmConfig(name="dlrm", dim=4, head=[8]),
        DcnConfig(name="dcn", dim=4, rank=3, head=[8]),
        DcnConfig(name="dcn", dim=4, rank=None, head=[8]),
        *(section.model_validate({"name": name, "dim": 4}) for name, section in BASELINES.items()),
        FinalMlpConfig(name="finalmlp", dim=4, gates=([0, 1], [])),
    ],
)
def test_a_model_built_on_meta_starts_like_any_other(config: OverArchConfig) -> None:
    torch.manual_seed(7)
    usual = build_over_arch(6, 1, config)
    initialize(usual, seed=3)
    with torch.device("meta"):
        built = build_over_arch(6, 1, config)
    materialize(built, torch.device("cpu"))
    initialize(built, seed=3)
    for (name, a), (_, b) in zip(usual.named_parameters(), built.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    x = torch.randn(3, 6, 4)
    assert torch.equal(usual(x), built(x))


def test_constants_and_spread() -> None:
    model = nn.ModuleDict({"mlp": MLP(400, [300], 50), "norm": nn.LayerNorm(9)})
    for parameter in model.parameters():
        nn.init.uniform_(parameter)
    initialize(model, seed=0)
    values = dict(model.named_parameters())
    assert (values["norm.weight"] == 1).all() and (values["norm.bias"] == 0).all()
    assert (values["mlp.linears.0.bias"] == 0).all()
    assert abs(values["mlp.linears.0.weight"].std() / math.sqrt(2 / 400) - 1) < 0.02
    assert abs(values["mlp.linears.1.weight"].std() / math.sqrt(1 / 300) - 1) < 0.05
