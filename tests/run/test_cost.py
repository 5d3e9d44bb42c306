"""The analytic cost against the modules' parameters, torch's FLOP counter, and published figures."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from megarec.config.base import Norm, TasksConfig
from megarec.config.models import OverArchConfig, WukongConfig
from megarec.models.recommender import Recommender
from megarec.run.cost import count, count_wukong, total
from megarec.sparse.towers.modules import TowerModules
from megarec.sparse.towers.sizes import TowerSizes, over_arch_config, over_arch_input
from tests.models import test_baselines as baselines
from tests.models import test_dcn as dcn
from tests.models import test_dlrm as dlrm
from tests.models import test_wukong as wukong
from tests.models.layouts import layout
from tests.sparse.towers.test_tower_modules import all_sizes

BATCH = 3


INPUTS = {"small_mlp": [3], "numeric_mlp": [4, 2], "small_embeddings": 2}
models = wukong.configs(**INPUTS) | dlrm.configs(**INPUTS) | dcn.configs(**INPUTS) | baselines.configs(**INPUTS)


@given(
    config=models,
    numeric_embeddings=st.integers(1, 2),
    full=st.lists(st.integers(1, 3), max_size=3),
    small=st.lists(st.integers(1, 3), max_size=2),
    numeric=st.integers(0, 3),
    norm=st.sampled_from(["none", "layer", "batch"]),
    device=st.sampled_from(["cpu", "meta"]),
)
@settings(max_examples=100, deadline=None)
def test_counts_what_the_model_has_and_does(
    config: OverArchConfig,
    numeric_embeddings: int,
    full: list[int],
    small: list[int],
    numeric: int,
    norm: Norm,
    device: str,
) -> None:
    assume(full or small or numeric)
    assume(config.name != "dlrm" or full not in ([], [1]) or small or numeric)  # a lone embedding has no pair
    config = config.model_copy(update={"numeric_embeddings": numeric_embeddings, "norm": norm})
    places = layout(config.dim, full, small)
    cost = count(config, places, numeric, places.tables)
    assert cost.sparse_parameters == sum(table.rows * table.columns for table in places.tables)

    with torch.device(device), FlopCounterMode(display=False) as counter:
        model = Recommender(places, numeric, config)
        embedded = torch.randn(BATCH, places.width, requires_grad=True)
        model(torch.randn(BATCH, numeric), embedded).sum().backward()
    assert cost.dense_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.flop * BATCH == counter.get_total_flops()


@given(
    config=models,
    heads=st.sampled_from(["shared", "mmoe", "ple", "esmm"]),
    experts=st.integers(1, 3),
    own=st.integers(1, 2),
    levels=st.integers(1, 3),
    expert=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    labels=st.integers(2, 3),
    norm=st.sampled_from(["none", "batch"]),
)
@settings(max_examples=60, deadline=None)
def test_counts_several_labels(
    config: OverArchConfig, heads: str, experts: int, own: int, levels: int, expert: list[int], labels: int, norm: Norm
) -> None:
    sizes = {"name": heads, "experts": experts, "own_experts": own, "levels": levels, "expert": expert}
    config = config.model_copy(update={"tasks": TasksConfig.model_validate(sizes), "norm": norm})
    places = layout(config.dim, [1, 1], [2])
    cost = count(config, places, 2, places.tables, labels=labels)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = Recommender(places, 2, config, labels=labels)
        logits = model(torch.randn(BATCH, 2), torch.randn(BATCH, places.width, requires_grad=True))
        logits.sum().backward()
    assert logits.shape == (BATCH, labels)
    assert cost.dense_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.flop * BATCH == counter.get_total_flops()


@given(config=models, modules=all_sizes(), numeric=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_counts_tower_modules_and_the_over_arch_behind_them(
    config: OverArchConfig, modules: TowerSizes, numeric: int
) -> None:
    assume(config.name != "dlrm" or sum(modules.outputs) > 1 or numeric)
    config = config.model_copy(update={"dim": modules.width})
    places = layout(modules.width, list(modules.inputs), [])
    sizes, columns = over_arch_config(config, modules), over_arch_input(places, modules)
    cost = count(sizes, columns, numeric, places.tables, modules)

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        bank = TowerModules(modules, range(len(modules.inputs)))
        model = Recommender(columns, numeric, sizes)
        pooled = torch.randn(BATCH, places.width, requires_grad=True)
        model(torch.randn(BATCH, numeric), bank(pooled)).sum().backward()
    assert list(cost.layers)[:3] == ["sparse", "towers", "inputs"]
    for tower, module in enumerate(bank.towers.values()):
        counted = cost.layers["towers"][f"towers.{tower}"].parameters
        assert counted == sum(parameter.numel() for parameter in module.parameters())
    assert cost.dense_parameters == sum(parameter.numel() for part in (bank, model) for parameter in part.parameters())
    assert cost.flop * BATCH == counter.get_total_flops()


@given(config=models)
@settings(max_examples=20, deadline=None)
def test_layers_parts_and_totals_agree(config: OverArchConfig) -> None:
    places = layout(config.dim, [1, 1], [2])
    cost = count(config, places, 2, places.tables)
    assert list(cost.layers)[:2] == ["sparse", "inputs"] and list(cost.layers)[-1] == "head"
    for parts in (cost.parts, {name: total(layer) for name, layer in cost.layers.items()}):
        assert sum(part.parameters for part in parts.values()) == cost.parameters
        assert sum(part.flop for part in parts.values()) == cost.flop
    assert cost.parameters == cost.dense_parameters + cost.sparse_parameters


def test_parts_and_layers_are_those_of_the_modules() -> None:
    sizes = {"layers": 3, "dim": 8, "num_fm": 4, "num_lcb": [3, 3, 4], "rank": 5, "mlp": [16, 12], "head": [9]}
    config = WukongConfig.model_validate(sizes | {"projection": "attentive"})
    places = layout(8, [1, 2, 1], [3, 4])
    cost = count(config, places, 6, places.tables)
    owners = {
        "projection.fm": "fm",
        "fmb.mlp": "fm_mlp",
        "projection.lcb": "lcb",
        "projection.residual": "residual",
        "norm": "layer_norm",
        "fmb.attention": "fm_attention",
        "head": "head",
        "small_mlp": "small_mlp",
        "numeric_mlp": "numeric_mlp",
    }
    sums = dict.fromkeys(owners.values(), 0)
    layers = dict.fromkeys(list(cost.layers)[1:], 0)
    for name, parameter in Recommender(places, 6, config).named_parameters():
        (owner,) = {part for key, part in owners.items() if key in name}
        sums[owner] += parameter.numel()
        (layer,) = {layer for layer in layers if layer in name}
        layers[layer] += parameter.numel()
    assert {name: part.parameters for name, part in cost.parts.items() if name != "tables"} == sums
    assert {name: total(cost.layers[name]).parameters for name in layers} == layers


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
