"""What model.sequences makes of the features of the data, and what it refuses."""

from typing import Any

import pytest

from megarec.config.base import SequenceConfig
from megarec.config.sections import EmbeddingConfig
from megarec.data.schema import CategoricalFeature, Schema
from megarec.errors import UserError
from megarec.sparse.layout import Feature, Sequence, build_layout, sequence_inputs
from megarec.sparse.placement import table_costs

LISTS = {"views": "last", "kinds": "last", "likes": "first", "tags": None}
SCHEMA = Schema(
    name="shop",
    label_rule="random",
    categorical=(
        *(CategoricalFeature(name=name, rows=rows) for name, rows in (("item", 30), ("kind", 9), ("user", 50))),
        *(
            CategoricalFeature(name=n, rows=9 if n == "kinds" else 30, multi_valued=True, newest=newest, mean_length=4)  # type: ignore[arg-type]
            for n, newest in LISTS.items()
        ),
        CategoricalFeature(name="weighted", rows=30, multi_valued=True, weighted=True, newest="last"),
    ),
    identity={"item": "numbers of shop", "views": "numbers of shop", "likes": "numbers of another"},
    rows={"train": 0, "valid": 0, "test": 0},
    source="made up",
)
BOTH = {"features": ["views", "kinds"], "target": ["item", "kind"], "block": "din", "max_length": 6}


def made(*sequences: dict[str, Any], **embedding: Any) -> Any:
    entries = [SequenceConfig.model_validate(entry) for entry in sequences]
    return build_layout(SCHEMA, EmbeddingConfig.model_validate(embedding), 8, entries)


def test_lists_leave_the_pooled_columns() -> None:
    layout = made(BOTH)
    assert [f.name for f in layout.features] == ["item", "kind", "user", "likes", "tags", "weighted"]
    assert [f.start for f in layout.features] == [0, 8, 16, 24, 32, 40]
    assert (layout.width, layout.sequence_columns) == (48, 6 * 16 + 6)
    assert layout.unpooled[0] == Feature("views", "views", "sum", True, 0, 8, mean_length=4, positions=6)
    assert layout.sequences == (Sequence(("views", "kinds"), 8, 6, 0),)
    assert {table.name for table in layout.tables} >= {"views", "kinds"}
    assert table_costs(layout)["views"] > table_costs(layout)["user"], "four rows an example travel"


def test_a_list_takes_the_table_of_its_target() -> None:
    layout = made({"features": ["views"], "target": ["item"], "block": "hstu", "tables": "target"})
    assert layout.unpooled[0].table == "item" and "views" not in {table.name for table in layout.tables}


def test_targets_travel_by_themselves_behind_tower_modules() -> None:
    entry = SequenceConfig.model_validate(BOTH)
    layout = build_layout(SCHEMA, EmbeddingConfig(), 8, [entry], targets_apart=True)
    assert [(f.name, f.positions) for f in layout.unpooled] == [("views", 6), ("kinds", 6), ("item", 1), ("kind", 1)]
    assert layout.sequences[-1] == Sequence(("item", "kind"), 8, 1, 102, masked=False)
    (own,) = sequence_inputs(layout, [entry], 20, targets_apart=True)
    assert (own.start, own.mask, own.targets) == (20, 20 + 96, (20 + 102, 20 + 110))


REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "names 'view', which is not a categorical feature of the run; did you mean 'views'": (
        [{**BOTH, "features": ["view", "kinds"]}], {},
    ),
    "'views', as entry 0 does": ([BOTH, {**BOTH, "block": "hstu"}], {}),
    "'tags' is in no known order; expected a list in order": ([{**BOTH, "features": ["tags", "kinds"]}], {}),
    "'likes' has its newest value first and 'views' last, but they share positions": (
        [{**BOTH, "features": ["views", "likes"]}], {},
    ),
    "'user' is single-valued": ([{**BOTH, "features": ["user", "kinds"]}], {}),
    "'weighted' is weighted": ([{**BOTH, "features": ["weighted", "kinds"]}], {}),
    "target: 'likes' is a list": ([{**BOTH, "target": ["likes", "kind"]}], {}),
    "'likes' .30 rows. does not have the ids of 'item'": (
        [{"features": ["likes"], "target": ["item"], "block": "din", "tables": "target"}], {},
    ),
    "embedding.features.item: a feature of model.sequences has one embedding": (
        [BOTH], {"features": {"item": {"embeddings": 2}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_a_sequence_is_named(message: str) -> None:
    sequences, embedding = REFUSED[message]
    with pytest.raises(UserError, match=message):
        made(*sequences, **embedding)


def test_heads_divide_the_columns_of_a_position() -> None:
    entry = SequenceConfig.model_validate({**BOTH, "block": "hstu", "heads": 3})
    layout = build_layout(SCHEMA, EmbeddingConfig(), 8, [entry])
    with pytest.raises(
        UserError, match=r"sequences.0.heads=3 does not divide the 16 columns .* 2 features x model.dim=8"
    ):
        sequence_inputs(layout, [entry], 48, targets_apart=False)


def test_a_list_without_a_target_lies_beside_the_others() -> None:
    entry = SequenceConfig.model_validate({**BOTH, "target": ["item"], "tables": "target"})
    layout = build_layout(SCHEMA, EmbeddingConfig(), 8, [entry])
    assert [(f.name, f.table) for f in layout.unpooled] == [("views", "item"), ("kinds", "kinds")]
    (own,) = sequence_inputs(layout, [entry], layout.width, targets_apart=False)
    assert (own.embeddings, own.columns, own.target_columns, own.targets) == (2, 16, 8, (0,))
    with pytest.raises(ValueError, match="1 features and 2 targets"):
        SequenceConfig.model_validate({**BOTH, "features": ["views"]})
