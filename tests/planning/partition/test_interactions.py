"""Interactions against a plain loop in float64, the distances wanted from them, and files that hold none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.errors import UserError
from megarec.planning.partition import interactions
from megarec.planning.partition.interactions import InteractionMean, read_interactions, second_differences
from megarec.planning.partition.mds import wanted_distances
from megarec.sparse.layout import EmbeddingLayout
from tests.models.layouts import layout

OF_ANY_LAYOUT = given(
    full=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    small=st.lists(st.integers(1, 3), max_size=3),
    examples=st.integers(1, 9),
    chunk=st.sampled_from([1, 60, 1 << 24]),
    seed=st.integers(0, 1000),
)


def plainly(pooled: torch.Tensor, features: EmbeddingLayout) -> np.ndarray:
    """Mean |cosine| over examples in which both vectors are not zero; the narrower is filled up with zeros."""
    count = len(features.features)
    found = np.eye(count)
    for i, a in enumerate(features.features):
        for j, b in enumerate(features.features):
            cosines = []
            for row in pooled.double().numpy():
                x, y = row[a.start : a.start + a.columns], row[b.start : b.start + b.columns]
                if x.any() and y.any():
                    both = min(len(x), len(y))
                    cosines.append(abs(float(x[:both] @ y[:both])) / float(np.linalg.norm(x) * np.linalg.norm(y)))
            if i != j:
                found[i, j] = np.mean(cosines) if cosines else 0
    return found


@settings(max_examples=20, deadline=None)
@OF_ANY_LAYOUT
def test_interactions_are_those_of_a_plain_loop(
    full: list[int], small: list[int], examples: int, chunk: int, seed: int
) -> None:
    of = layout(4, full, small)
    random = torch.Generator().manual_seed(seed)
    pooled = torch.randn(examples, of.width, generator=random)
    for feature in of.features:  # empty lists
        empty = torch.rand(examples, generator=random) < 0.3
        pooled[empty, feature.start : feature.start + feature.columns] = 0
    mean = InteractionMean(of)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interactions, "CHUNK_COSINES", chunk)
        mean.add(pooled[: examples // 2])
        mean.add(pooled[examples // 2 :])
    assert mean.examples == examples
    np.testing.assert_allclose(mean.mean(), plainly(pooled, of), atol=2e-6)


@settings(max_examples=20, deadline=None)
@OF_ANY_LAYOUT
def test_a_bilinear_logit_has_its_own_second_differences(
    full: list[int], small: list[int], examples: int, chunk: int, seed: int
) -> None:
    """f(x) = x' W x / 2 + w x: the mixed difference is (x_i - x'_i)' W_ij (x_j - x'_j), exactly."""
    of = layout(4, full, small)
    random = torch.Generator().manual_seed(seed)
    weights, linear = torch.randn(of.width, of.width, generator=random), torch.randn(of.width, generator=random)
    x, other = torch.randn(2, examples, of.width, generator=random)

    def logits(x: torch.Tensor) -> torch.Tensor:
        return ((x @ (weights + weights.T)) * x).sum(1) / 2 + x @ linear

    step = (x - other).double().numpy()
    both = (weights + weights.T).double().numpy()
    parts = [slice(feature.start, feature.start + feature.columns) for feature in of.features]
    expected = np.array([
        [0.0 if i is j else np.mean([abs(row[i] @ both[i, j] @ row[j]) for row in step]) for j in parts] for i in parts
    ])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interactions, "CHUNK_COLUMNS", chunk)
        found = second_differences(logits, of, x, other)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_size_of_an_embedding_does_not_count() -> None:
    of = layout(8, [1, 1, 1], [])
    pooled = torch.randn(50, of.width, generator=torch.Generator().manual_seed(1))
    tiny, large = InteractionMean(of), InteractionMean(of)
    tiny.add(pooled * 1e-6)
    large.add(pooled)
    np.testing.assert_allclose(tiny.mean(), large.mean(), atol=1e-6)


def test_distance_falls_or_rises_with_interaction_over_its_whole_range() -> None:
    found = np.array([[1, 0.2, 0.3], [0.2, 1, 0.4], [0.3, 0.4, 1]])
    np.testing.assert_allclose(wanted_distances(found, "coherent"), [[0, 1, 0.5], [1, 0, 0], [0.5, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(wanted_distances(found, "diverse"), [[0, 0, 0.5], [0, 0, 1], [0.5, 1, 0]], atol=1e-12)
    alike = np.full((3, 3), 0.2)
    np.testing.assert_array_equal(wanted_distances(alike, "diverse"), 1 - np.eye(3))
    assert wanted_distances(np.ones((1, 1)), "coherent") == np.zeros((1, 1))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"not an array", "cannot be read (no .npy file of numbers)"),
        (np.eye(2), "a matrix [2, 2], but the run has 3 categorical features: expected [3, 3]"),
        (np.full((3, 3), "x"), "holds no numbers"),
        (np.full((3, 3), np.nan), "expected a symmetric matrix of finite values, from 0 to 1e+100"),
        (np.full((3, 3), 1.7e308), "expected a symmetric matrix of finite values, from 0 to 1e+100"),
        (np.full((3, 3), -0.5), "expected a symmetric matrix of finite values, from 0 to 1e+100"),
        (np.triu(np.ones((3, 3))), "expected a symmetric matrix of finite values, from 0 to 1e+100"),
    ],
)
def test_files_without_interactions_are_told(content: np.ndarray | bytes | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "found.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(UserError) as caught:
        read_interactions(path, 3)
    assert expected in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
