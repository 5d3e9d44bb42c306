"""Which backend holds which table, and that both backends do the same."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.config.sections import EmbeddingConfig
from megarec.embeddings import tables
from megarec.embeddings.layout import EmbeddingLayout, Feature, Table
from megarec.embeddings.placement import place
from megarec.embeddings.tables import choose_backends
from megarec.errors import UserError
from tests.embeddings.plain import LAYOUT, train_plain
from tests.embeddings.ranks import together, train

CPU = torch.device("cpu")


def choices(ranks: int = 1, layout: EmbeddingLayout = LAYOUT, **embedding: object) -> dict[str, tables.Choice]:
    config = EmbeddingConfig(**embedding)  # type: ignore[arg-type]
    return choose_backends(layout, place(layout, config.placement, ranks), config, CPU)


def test_auto_takes_fbgemm_where_it_can_and_says_why_not() -> None:
    assert {choice.backend for choice in choices().values()} == {"fbgemm"}
    assert {choice.backend for choice in choices(backend="torch").values()} == {"torch"}
    assert "Adam" in choices(optimizer="adam")["user"].reason
    split = choices(2, placement="column")
    assert (split["user"].backend, split["small"].backend) == ("torch", "fbgemm")  # small has 4 columns: one slice
    assert "whole row" in split["user"].reason
    assert {c.backend for c in choices(2, placement="column", optimizer="adagrad").values()} == {"fbgemm"}
    odd = EmbeddingLayout(6, (Table("t", 5, 6),), (Feature("t", "t", "sum", False, 0, 6),), 1, 0)
    assert "6 columns are no multiple of 4" in choices(layout=odd)["t"].reason


def test_fbgemm_by_name_where_it_cannot_is_an_error() -> None:
    with pytest.raises(UserError, match=r"""backend="fbgemm" cannot hold table 'item': Adam.*; use "auto\""""):
        choices(backend="fbgemm", optimizer="adam")


def test_without_fbgemm_everything_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megarec.embeddings.fbgemm_tables", None)  # importing it raises ImportError
    tables._fbgemm_problem.cache_clear()
    try:
        choice = choices()["user"]
        assert (choice.backend, "cannot be imported" in choice.reason) == ("torch", True)
        with pytest.raises(UserError, match="cannot be imported"):
            choices(backend="fbgemm")
    finally:
        tables._fbgemm_problem.cache_clear()


def test_a_cpu_build_is_not_used_on_cuda() -> None:
    if torch.cuda.is_available():
        pytest.skip("this installation may have CUDA kernels")
    config = EmbeddingConfig()
    choice = choose_backends(LAYOUT, place(LAYOUT, "table", 1), config, torch.device("cuda"))["user"]
    assert (choice.backend, "without CUDA" in choice.reason) == ("torch", True)


@st.composite
def layouts(draw: st.DrawFn) -> EmbeddingLayout:
    """Tables of any size, shared or not, features of any kind in any order."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 12), st.sampled_from([4, 8, 12])), min_size=1, max_size=4))
    made = [Table(f"t{index}", rows, columns) for index, (rows, columns) in enumerate(sizes)]
    users = draw(st.permutations(made + draw(st.lists(st.sampled_from(made), max_size=3))))
    features, start = [], 0
    for index, table in enumerate(users):
        pooling, multi = draw(st.sampled_from([("sum", False), ("sum", True), ("mean", True)]))
        features.append(Feature(f"f{index}", table.name, pooling, multi, start, table.columns))
        start += table.columns
    return EmbeddingLayout(4, tuple(made), tuple(features), 0, start)


@settings(max_examples=40, deadline=None)
@given(
    layout=layouts(),
    optimizer=st.sampled_from(["rowwise_adagrad", "adagrad", "sgd"]),
    examples=st.integers(1, 9),
)
def test_both_backends_train_as_plain_torch(layout: EmbeddingLayout, optimizer: str, examples: int) -> None:
    trained = {}
    for backend in ("torch", "fbgemm"):
        # a large eps: g / (|g| + eps) turns the rounding of a gradient that cancels to nothing into a step
        config = EmbeddingConfig(optimizer=optimizer, backend=backend, learning_rate=0.1, eps=0.1)  # type: ignore[arg-type]
        trained[backend] = together(layout, [train(layout, config, examples, steps=2)])
    plain = train_plain(layout, config, examples, steps=2)
    # gradients that nearly cancel keep the rounding of their large parts; a wrong update is off by far more than 1e-4
    for found in trained.values():
        for mine, its in zip(found.embedded, plain.embedded, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
        for name, tensor in plain.state.items():
            torch.testing.assert_close(found.state[name], tensor, rtol=1e-4, atol=1e-5)
