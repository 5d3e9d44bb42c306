"""Known points come back up to a rotation; the stress is what its formula says; a thousand features finish."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.planning.partition.mds import place_in_plane


def distances_of(points: np.ndarray) -> np.ndarray:
    return np.sqrt(((points[:, None] - points) ** 2).sum(2))


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 30), seed=st.integers(0, 10_000))
def test_known_points_come_back_up_to_a_rotation(count: int, seed: int) -> None:
    truth = np.random.default_rng(seed).normal(size=(count, 2))
    truth -= truth.mean(0)
    found, stress = place_in_plane(distances_of(truth), seed=1)
    assert stress < 1e-6
    left, _, right = np.linalg.svd(found.T @ truth)  # Procrustes: the best rotation or reflection
    np.testing.assert_allclose(found @ left @ right, truth, atol=1e-5)


def test_one_feature_and_equal_places() -> None:
    points, stress = place_in_plane(np.zeros((1, 1)), seed=1)
    assert points.shape == (1, 2) and stress == 0
    points, stress = place_in_plane(np.zeros((4, 4)), seed=1)
    assert np.isfinite(points).all() and stress == 0


def test_stress_is_its_formula_and_no_worse_than_classical_scaling() -> None:
    random = np.random.default_rng(3)
    wanted = distances_of(random.normal(size=(20, 6)))  # six dimensions do not fit into two
    points, stress = place_in_plane(wanted, seed=1)
    total = missed = 0.0
    for i in range(20):
        for j in range(20):
            missed += (float(np.linalg.norm(points[i] - points[j])) - wanted[i, j]) ** 2
            total += wanted[i, j] ** 2
    assert stress == pytest.approx((missed / total) ** 0.5, rel=1e-6)
    centred = -0.5 * (np.eye(20) - 1 / 20) @ wanted**2 @ (np.eye(20) - 1 / 20)
    values, vectors = np.linalg.eigh(centred)
    classical = distances_of(vectors[:, -2:] * np.sqrt(values[-2:]))
    assert 0.05 < stress < np.sqrt(((classical - wanted) ** 2).sum() / total)


def test_the_seed_decides() -> None:
    wanted = distances_of(np.random.default_rng(4).normal(size=(15, 9)))
    first, again = (place_in_plane(wanted, seed=7)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
