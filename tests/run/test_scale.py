"""The dial against the recipe's promises, over many targets and data sets, and against the paper's own rows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.config.models import DcnConfig, WukongConfig
from megarec.config.towers import WukongTowerConfig
from megarec.errors import UserError
from megarec.run.cost import count
from megarec.run.scale import resolve_scale
from megarec.sparse.towers.sizes import module_sizes, over_arch_input
from tests.models.layouts import layout


def derived(config: WukongConfig, n: int, numeric: int = 0) -> tuple[WukongConfig, float]:
    """The derived sizes over n embeddings, and their GFLOP/example."""
    places = layout(config.dim, [1] * n, [])
    model, reasons = resolve_scale(config, places, numeric)
    assert isinstance(model, WukongConfig) and model.scale is None and len(reasons) == 2
    return model, count(model, places, numeric, places.tables).flop / 1e9


def widths(model: WukongConfig) -> list[int]:
    assert isinstance(model.num_fm, int) and isinstance(model.num_lcb, int) and isinstance(model.rank, int)
    return [model.num_fm, model.num_lcb, model.rank, *(width for width in model.mlp if isinstance(width, int))]


def smallest(config: WukongConfig, n: int) -> float:
    """The least GFLOP/example, as the message says it."""
    with pytest.raises(UserError, match="the smallest model of the recipe") as caught:
        derived(config.model_copy(update={"scale": 1e-9}), n)
    return float(str(caught.value).split(" takes ")[1].split(" GFLOP")[0])


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(8, 1200),
    dim=st.sampled_from([16, 40, 64, 160]),
    targets=st.tuples(st.floats(1, 300), st.floats(1, 300)).map(sorted),
    projection=st.sampled_from(["static", "attentive"]),
    fm=st.sampled_from(["optimized", "full"]),
)
def test_promises(n: int, dim: int, targets: list[float], projection: str, fm: str) -> None:
    config = WukongConfig(dim=dim, projection=projection, fm=fm)  # type: ignore[arg-type]
    least = smallest(config, n)
    models = []
    for times in targets:
        scale = least * times
        model, gflop = derived(config.model_copy(update={"scale": scale}), n)
        assert gflop == pytest.approx(scale, rel=0.25 if fm == "full" else 0.20 if model.layers <= 3 else 0.15)
        assert all(width % 8 == 0 for width in widths(model))
        assert model.layers == 8 or widths(model) == widths(derived(config.model_copy(update={"scale": least}), n)[0])
        models.append(model)
    less, more = models
    assert less.layers <= more.layers
    assert all(a <= b for a, b in zip(widths(less), widths(more), strict=True))


@pytest.mark.parametrize(
    ("gflop", "sizes"),
    [
        (0.496, (2, 8, 24, 2048)),
        (5.278, (8, 48, 48, 4096)),
        (23.38, (8, 96, 96, 8192)),
        (117.28, (8, 192, 192, 16384)),
    ],
)
def test_rows_of_the_paper_lie_on_the_path(gflop: float, sizes: tuple[int, int, int, int]) -> None:
    layers, embeddings, rank, width = sizes
    config = WukongConfig(dim=160, head=[2048], numeric_mlp=[2048], numeric_embeddings=32, scale=gflop)
    model, _ = derived(config, 691, numeric=64)
    assert (model.layers, widths(model)) == (layers, [embeddings, embeddings, rank, width, width, width])


def test_what_the_recipe_leaves_alone_stays() -> None:
    config = WukongConfig(dim=32, scale=0.1, head=[77], bias=False, dropout=0.1, projection="attentive")
    model, _ = derived(config, 20)
    scaled = {"scale", "layers", "num_fm", "num_lcb", "rank", "mlp"}
    assert model.model_dump(exclude=scaled) == config.model_dump(exclude=scaled)


def test_behind_tower_modules_the_over_arch_is_scaled_at_their_width() -> None:
    """The dial aims at all of the cost."""
    module = WukongTowerConfig(name="wukong", compression=4)
    modules, _ = module_sizes(module, 64, [13, 13], bias=True)
    columns = over_arch_input(layout(64, [1] * 26, []), modules)
    model, reasons = resolve_scale(WukongConfig(dim=modules.dim, scale=0.5), columns, 3, modules)
    assert isinstance(model, WukongConfig) and model.scale is None and model.dim == modules.dim
    assert model.mlp[0] == pytest.approx(8 / 15 * max(model.num_fm, 24) * modules.dim, rel=0.05)
    assert count(model, columns, 3, (), modules).flop / 1e9 == pytest.approx(0.5, rel=0.15)
    assert f"over n={sum(modules.outputs) + 1}, d=32" in reasons[0]
    with pytest.raises(UserError, match=r"over these n=14 embeddings of d=32"):
        resolve_scale(WukongConfig(dim=modules.dim, scale=1e-9), columns, 3, modules)


def test_nothing_to_derive() -> None:
    for config in (WukongConfig(layers=3), DcnConfig(name="dcn")):
        assert resolve_scale(config, layout(64, [1, 1], []), 0) == (config, ())


def test_the_reasons_say_what_came_out_and_why() -> None:
    config = WukongConfig(dim=160, head=[2048], numeric_mlp=[2048], numeric_embeddings=32)
    places = layout(160, [1] * 691, [])

    def reasons(scale: float) -> tuple[str, ...]:
        return resolve_scale(config.model_copy(update={"scale": scale}), places, 64)[1]

    assert reasons(0.7) == (
        "scale: layers=5, num_fm=8, num_lcb=8, rank=24, mlp=3 x 2048: 0.7107 GFLOP/example over n=723, d=160; "
        "asked for 0.7 (+1.5%)",
        "scale: layers grow first, 2 to 8, at the recipe's smallest widths",
    )
    assert reasons(5.6)[0].startswith(
        "scale: layers=8, num_fm=48, num_lcb=56, rank=48, mlp=3 x 4288: 5.69 GFLOP/example"
    )
    assert "at the recipe's smallest widths reach 0.9256 GFLOP/example; beyond, num_fm" in reasons(5.6)[1]


def test_what_the_message_asks_for_is_enough() -> None:
    for n in (1, 9, 100, 723):
        config = WukongConfig(dim=16)
        derived(config.model_copy(update={"scale": smallest(config, n)}), n)
