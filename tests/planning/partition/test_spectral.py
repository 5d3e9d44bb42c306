"""Spectral coordinates: groups at points of their own, whatever the strength of a feature's own effect."""

import numpy as np
import pytest

from megarec.planning.partition.spectral import coordinates


def test_groups_without_interactions_across_lie_at_one_point_each() -> None:
    group = np.arange(20) % 5
    found = coordinates((group[:, None] == group).astype(float), 5)
    same = found @ found.T  # rows of length 1: cosines
    np.testing.assert_allclose(same, group[:, None] == group, atol=1e-9)


def test_a_strong_feature_is_near_to_its_group_only() -> None:
    """Interactions grow with the effects of both features: without the scaling all would be near to the strongest."""
    random = np.random.default_rng(1)
    group, effect = np.arange(24) % 4, np.exp(random.normal(size=24))
    interactions = np.where(group[:, None] == group, 1.5, 1.0) * np.outer(effect, effect)
    found = coordinates(interactions, 4)
    near = found @ found.T - 2 * np.eye(24)
    assert (group[near.argmax(1)] == group).all()


@pytest.mark.parametrize("features", [1, 2, 5])
def test_features_that_interact_alike_or_not_at_all_have_coordinates(features: int) -> None:
    for level in (0.0, 0.3):
        found = coordinates(np.full((features, features), level), 2)
        assert found.shape == (features, min(2, features)) and np.isfinite(found).all()
