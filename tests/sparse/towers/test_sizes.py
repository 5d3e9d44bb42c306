"""Presets reach their compression; what a config asks for becomes sizes; mistakes are named."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megarec.config.models import WukongConfig
from megarec.config.sections import EmbeddingConfig, FeatureEmbedding, RunConfig
from megarec.config.towers import DcnTowerConfig, DlrmTowerConfig, TowerModule, WukongTowerConfig
from megarec.data.schema import CategoricalFeature, Schema
from megarec.errors import UserError
from megarec.sparse.layout import EmbeddingLayout, build_layout
from megarec.sparse.towers.sizes import apportion, module_sizes, over_arch_config, over_arch_input, resolve_towers

SECTIONS: dict[str, type[TowerModule]] = {"dlrm": DlrmTowerConfig, "dcn": DcnTowerConfig, "wukong": WukongTowerConfig}


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("compression", [2, 4, 8])
@pytest.mark.parametrize("inputs", [[13, 13], [20, 6], [7, 7, 6, 6], [14, 9, 2, 1]], ids=str)
def test_presets_of_the_benchmark_are_exact(name: str, compression: int, inputs: list[int]) -> None:
    """26 features x 64; least of all where a Wukong tower cannot go below two embeddings."""
    sizes, reason = module_sizes(SECTIONS[name](name=name, compression=compression), 64, inputs, bias=True)
    assert sizes.compression == pytest.approx(compression, rel=0.02)
    assert f"(asked for {compression})" in reason and f"compression {sizes.compression:.3g}" in reason
    assert all(count > 0 for count in sizes.outputs)


@given(
    name=st.sampled_from(sorted(SECTIONS)),
    inputs=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    width=st.integers(1, 160),
    compression=st.sampled_from([1, 1.5, 2, 3, 4, 8, 16]),
)
@settings(max_examples=200, deadline=None)
def test_a_preset_misses_by_less_than_its_roundings(
    name: str, inputs: list[int], width: int, compression: float
) -> None:
    """Of the numbers that leave: DLRM rounds c at each tower, the others the whole number of embeddings."""
    assume(name != "dlrm" or compression <= width)
    sizes, _ = module_sizes(SECTIONS[name](name=name, compression=compression), width, inputs, bias=True)
    wanted, emitted = sum(inputs) * width / compression, sum(sizes.outputs) * sizes.dim
    least = len(inputs) * (2 if name == "wukong" else 1)
    rounded = len(inputs) if name == "dlrm" else 1
    assert abs(emitted - wanted) <= max(rounded * sizes.dim / 2, least * sizes.dim) + 1e-6
    if name == "dlrm":
        assert sizes.outputs == tuple(sizes.module.c + sizes.module.p * features for features in inputs)
    if name == "wukong":
        layers = [sizes.interaction(tower) for tower in range(len(inputs))]
        assert [layer.outputs for layer in layers] == list(sizes.outputs)
        assert all(layer.num_fm and layer.num_lcb for layer in layers)


@given(
    weights=st.lists(st.integers(1, 50), min_size=1, max_size=9),
    least=st.integers(0, 2),
    more=st.integers(0, 60),
)
@settings(max_examples=200, deadline=None)
def test_apportioned_parts_add_up_and_stay_proportional(weights: list[int], least: int, more: int) -> None:
    total = least * len(weights) + more
    parts = apportion(total, weights, least)
    assert sum(parts) == total and min(parts) >= least
    quotas = [total * weight / sum(weights) for weight in weights]
    if all(quota >= least for quota in quotas):
        assert all(abs(part - quota) < 1 + least for part, quota in zip(parts, quotas, strict=True))
    assert all(
        a >= b for a, w in zip(parts, weights, strict=True) for b, v in zip(parts, weights, strict=True) if w > v
    )


def test_a_wide_dlrm_embedding_leaves_only_those_of_the_whole_tower() -> None:
    sizes, reason = module_sizes(DlrmTowerConfig(name="dlrm", compression=4, dim=64), 64, [13, 13], bias=True)
    assert (sizes.module.c, sizes.module.p, sizes.outputs) == (3, 0, (3, 3))
    assert "compression 4.33 (asked for 4)" in reason


def test_wukong_keeps_embeddings_that_layer_norm_does_not_flatten() -> None:
    sizes, reason = module_sizes(WukongTowerConfig(name="wukong", compression=4), 16, [1, 2, 1, 1], bias=True)
    assert (sizes.dim, sizes.outputs) == (4, (2, 2, 2, 2))
    assert "compression 2.5 (asked for 4)" in reason


def test_a_compression_beyond_the_width_is_refused() -> None:
    with pytest.raises(UserError, match=r"tower_module\.compression=16 exceeds model\.dim=8: less than one number"):
        module_sizes(DlrmTowerConfig(name="dlrm", compression=16), 8, [3], bias=True)


def test_given_sizes_are_taken() -> None:
    wukong, reason = module_sizes(WukongTowerConfig(name="wukong", num_fm=3, num_lcb=1), 8, [5, 2], bias=True)
    assert (wukong.outputs, wukong.dim, wukong.interaction(1).num_fm) == ((4, 4), 8, 3)
    assert (
        reason
        == "tower modules: wukong: 7 embeddings of 8 -> 8 of 8 (4, 4 by tower), compression 0.875 (sizes as given)"
    )
    dcn, _ = module_sizes(DcnTowerConfig(name="dcn", embeddings=2, dim=4), 8, [5, 2], bias=True)
    assert (dcn.outputs, dcn.dim) == ((2, 2), 4)


def layout(**features: FeatureEmbedding) -> EmbeddingLayout:
    categorical = tuple(CategoricalFeature(name=name, rows=9) for name in "abcde")
    return build_layout(
        Schema(name="test", categorical=categorical, rows={}), EmbeddingConfig(features=features), dim=8
    )


def run(towers: object, module: object) -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"dim": 8}, "data": {"path": "x"}, "parallel": {"towers": towers}, "tower_module": module}
    )


def test_a_config_becomes_towers_and_sizes() -> None:
    places = layout(b=FeatureEmbedding(embeddings=3))
    towers, modules, reasons = resolve_towers(
        run([["e", "b"], ["a", "c", "d"]], {"name": "dlrm", "compression": 2}), places
    )
    assert towers is not None and towers.features == (("b", "e"), ("a", "c", "d"))
    assert modules is not None and (modules.inputs, modules.outputs, modules.dim) == ((4, 3), (4, 3), 4)
    assert reasons[0] == "towers: 2, of 2, 3 features" and reasons[1].startswith("tower modules: dlrm, c=0, p=1: 7 ")
    seen = over_arch_input(places, modules)
    assert (seen.dim, seen.full_embeddings, seen.small_columns, seen.width) == (4, 7, 0, 28)
    assert over_arch_config(WukongConfig(dim=8, layers=3), modules) == WukongConfig(dim=4, layers=3)


def test_identity_and_no_towers_leave_the_over_arch_alone() -> None:
    places = layout(c=FeatureEmbedding(width=3))
    for config, count in ((run(None, {}), None), (run(2, {}), 2)):
        towers, modules, reasons = resolve_towers(config, places)
        assert modules is None and (None if towers is None else len(towers)) == count
        assert len(reasons) == (count is not None)
        seen = over_arch_input(places, modules)
        assert (seen.dim, seen.full_embeddings, seen.small_columns, seen.width) == (8, 4, 3, places.width)
        assert over_arch_config(config.model, modules) is config.model


def test_modules_refuse_small_embeddings() -> None:
    config = run(2, {"name": "dcn", "compression": 2})
    with pytest.raises(UserError, match=r"but embedding\.features\.c\.width=3: leave that width out, or set tower_mod"):
        resolve_towers(config, layout(c=FeatureEmbedding(width=3)))
