"""A resolved model is what its pieces give when they are called alone, and a mistake is one line."""

from typing import Any

import pytest

from megarec.config.models import WukongConfig
from megarec.config.sections import RunConfig
from megarec.data.schema import CategoricalFeature, Schema
from megarec.errors import UserError
from megarec.run.cost import count
from megarec.run.scale import resolve_scale
from megarec.run.spec import resolve
from megarec.sparse.layout import build_layout
from megarec.sparse.towers.sizes import over_arch_config, over_arch_input, resolve_towers

SCHEMA = Schema(
    name="made up",
    categorical=tuple(CategoricalFeature(name=f"f{i}", rows=100 + i) for i in range(8)),
    numeric=("age", "price"),
    rows={},
)
TOWERS = {"parallel": {"towers": 2}, "tower_module": {"name": "dlrm", "compression": 4}}


def config_of(model: dict[str, Any], **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"model": model, "data": {"path": "", "batch_size": 64}, **sections})


def test_towers_and_the_dial() -> None:
    config = config_of({"dim": 64, "scale": 0.05, "head": [32]}, **TOWERS, embedding={"dropout": 0.1})
    spec = resolve(config, SCHEMA)
    layout = build_layout(SCHEMA, config.embedding, 64)
    towers = resolve_towers(config, layout)
    assert towers.modules is not None
    columns = over_arch_input(layout, towers.modules)
    sizes, reasons = resolve_scale(over_arch_config(config.model, towers.modules), columns, 2, towers.modules)
    assert (spec.layout, spec.towers, spec.columns, spec.dense_sizes) == (layout, towers, columns, sizes)
    assert spec.cost == count(sizes, columns, 2, layout.tables, towers.modules)
    assert spec.reasons == (*towers.reasons, *reasons)
    assert isinstance(spec.sizes, WukongConfig) and spec.sizes.scale is None
    assert spec.sizes.dim == 64 and spec.dense_sizes.dim == 16
    assert over_arch_config(spec.sizes, towers.modules) == spec.dense_sizes

    again = resolve(config.model_copy(update={"model": spec.sizes}), SCHEMA)  # as a run goes on
    assert (again.layout, again.towers, again.sizes, again.cost) == (layout, towers, spec.sizes, spec.cost)

    model = spec.meta_model()
    assert all(parameter.is_meta for parameter in model.parameters())
    of_towers = sum(part.parameters for part in spec.cost.layers["towers"].values())
    assert sum(p.numel() for p in model.parameters()) == spec.cost.dense_parameters - of_towers
    assert model.inputs.dropout.p == 0.1


def test_explicit_sizes_without_towers_stay() -> None:
    config = config_of({"name": "dcn", "dim": 16})
    spec = resolve(config, SCHEMA)
    assert spec.sizes == spec.dense_sizes == config.model and spec.reasons == ()
    assert spec.columns.width == spec.layout.width == 8 * 16
    assert spec.cost == count(config.model, spec.layout, 2, spec.layout.tables)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"embedding": {"features": {"f9": {"width": 4}}}}, "no such categorical feature"),
        ({"parallel": {"towers": 9}}, "parallel.towers"),
        ({"parallel": {"towers": 2}, "tower_module": {"name": "dlrm", "compression": 100}}, "compression=100 exceeds"),
        (TOWERS | {"model": {"dim": 64, "scale": 1e-9}}, "model.scale=1e-09: the smallest model of the recipe"),
    ],
)
def test_a_mistake_is_one_line(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve(config_of(**{"model": {"dim": 16}, **sections}), SCHEMA)
    assert "\n" not in str(caught.value)
