"""Features to towers: lists, strides, mistakes, and the order of columns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.config.sections import EmbeddingConfig, FeatureEmbedding
from megarec.data.schema import CategoricalFeature, Schema
from megarec.errors import UserError
from megarec.sparse.layout import EmbeddingLayout, build_layout
from megarec.sparse.towers.assignment import Towers, assign_towers, check_towers, tower_columns

DIM = 4


def layout(features: int, shared: dict[int, int] | None = None, wishes: dict[int, FeatureEmbedding] | None = None):
    """Features f0, f1, ...; `shared` says whose table one takes, `wishes` how one is embedded."""
    categorical = tuple(
        CategoricalFeature(name=f"f{i}", rows=5, table=f"f{shared[i]}" if shared and i in shared else None)
        for i in range(features)
    )
    wish = {f"f{i}": embedding for i, embedding in (wishes or {}).items()}
    return build_layout(Schema(name="test", categorical=categorical, rows={}), EmbeddingConfig(features=wish), dim=DIM)


def test_lists_are_put_in_canonical_order() -> None:
    towers = assign_towers(layout(5), [["f3", "f1"], ["f4"], ["f2", "f0"]])
    assert towers.features == (("f1", "f3"), ("f4",), ("f0", "f2"))
    assert len(towers) == 3


def test_a_number_strides_over_tables() -> None:
    assert assign_towers(layout(5), 2).features == (("f0", "f2", "f4"), ("f1", "f3"))
    # f2 takes f1's table: the tables f0, f1, f3, f4 alternate, f2 goes with f1
    assert assign_towers(layout(5, shared={2: 1}), 2).features == (("f0", "f3"), ("f1", "f2", "f4"))


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ([["f0", "f1"], ["f2"]], "parallel.towers misses f3: put every categorical feature in a tower"),
        ([["f0", "f1"], ["f2", "f3", "f0"]], "parallel.towers names 'f0' twice, in towers 0 and 1: keep it in one"),
        ([["f0", "f1"], ["f2", "f3x"]], "parallel.towers[1] names 'f3x', which is not a categorical feature of the"),
        ([["f0", "f1"], ["f2", "f3x"]], "did you mean 'f3'?"),
        ([["f0", "f1", "f2", "f3"], []], "parallel.towers[1] is empty: give it a feature, or leave the tower out"),
        ([], "parallel.towers lists no tower: give each tower's features"),
        (
            [["f0", "f2"], ["f1", "f3"]],
            "puts 'f0' in tower 0 and 'f3' in tower 1, but they share the table 'f0': put them in one tower",
        ),
        (4, "parallel.towers=4: 4 categorical features with 3 tables fill at most 3 towers"),
    ],
)
def test_mistakes_are_named(wish: int | list[list[str]], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        assign_towers(layout(4, shared={3: 0}), wish)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_towers_are_a_multiple_of_the_hosts() -> None:
    towers = Towers((("a",), ("b",), ("c",), ("d",)))
    for hosts, expected in ((1, [range(4)]), (2, [range(2), range(2, 4)]), (4, [range(i, i + 1) for i in range(4)])):
        check_towers(towers, hosts)
        assert [towers.of_host(host, hosts) for host in range(hosts)] == expected
    with pytest.raises(UserError, match=r"gives 4 towers to 3 hosts: 4 / 3 = 1\.33 on each; take a multiple of 3"):
        check_towers(towers, 3)
    with pytest.raises(UserError, match=r"4 towers to 8 hosts: 4 / 8 = 0\.5 on each; .*such as 8"):
        check_towers(towers, 8)


@st.composite
def assigned(draw: st.DrawFn) -> tuple[EmbeddingLayout, Towers]:
    """Features of several and of small widths in uneven towers."""
    features = draw(st.integers(1, 8))
    kinds = st.sampled_from([FeatureEmbedding(), FeatureEmbedding(embeddings=2), FeatureEmbedding(width=3)])
    places = layout(features, wishes={i: draw(kinds) for i in range(features)})
    labels = draw(st.lists(st.integers(0, 2), min_size=features, max_size=features))
    wish = [[f"f{i}" for i in range(features) if labels[i] == tower] for tower in sorted(set(labels))]
    return places, assign_towers(places, draw(st.sampled_from([wish, len(wish)])))


@given(assigned())
@settings(max_examples=60, deadline=None)
def test_tower_order(case: tuple[EmbeddingLayout, Towers]) -> None:
    places, towers = case
    columns = tower_columns(places, towers)
    x = torch.randn(3, places.width)
    blocks = [x[:, tower] for tower in columns]
    starts = {feature.name: (feature.start, feature.columns) for feature in places.features}
    for names, block in zip(towers.features, blocks, strict=True):
        for name in names:
            start, width = starts[name]
            assert torch.equal(block[:, :width], x[:, start : start + width])
            block = block[:, width:]
        assert block.shape[1] == 0
