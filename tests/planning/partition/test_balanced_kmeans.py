"""Clusters keep their limits, are as good as the best of all small assignments, and find planted groups."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.planning.partition.balanced_kmeans import (
    constrained_kmeans,
    dealt_round_robin,
    even_assignment,
    fits,
    largest_first,
    loads_of,
)
from megarec.planning.partition.mds import Kind, place_in_plane, wanted_distances
from megarec.planning.partition.spectral import coordinates

FREE = np.full(3, np.inf)


def made_up(units: int, towers: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points [U, 2], and costs [U, 3] in multiples of a tower's mean: skewed ones, small whole ones, equal ones."""
    random = np.random.default_rng(seed)
    costs = np.stack([random.lognormal(size=units), random.integers(1, 4, units), np.ones(units)], axis=1)
    return random.normal(size=(units, 2)), costs / (costs.sum(0) / towers)


@settings(max_examples=30, deadline=None)
@given(
    towers=st.integers(1, 5), more=st.integers(0, 20), slack=st.sampled_from([1.0, 1.1, 1.5]), seed=st.integers(0, 999)
)
def test_every_tower_keeps_its_limits_and_none_is_empty(towers: int, more: int, slack: float, seed: int) -> None:
    points, costs = made_up(towers + more, towers, seed)
    even = even_assignment(costs, FREE, towers, seed)
    limits = slack * loads_of(even, costs, towers).max(0)
    found = constrained_kmeans(points, np.ones(len(points)), costs, limits, even, towers, seed)
    for tower in range(towers):
        held = costs[found == tower]
        assert len(held) > 0
        assert (held.sum(0) <= limits * (1 + 1e-8)).all()


@settings(max_examples=15, deadline=None, derandomize=True)  # a heuristic: it promises nothing for every case
@given(towers=st.integers(2, 3), seed=st.integers(0, 999))
def test_k_means_is_near_the_best_of_all_assignments(towers: int, seed: int) -> None:
    units = 7
    points, costs = made_up(units, towers, seed)
    weights = np.random.default_rng(seed).integers(1, 4, units).astype(float)
    even = even_assignment(costs, FREE, towers, seed)
    limits = 1.2 * loads_of(even, costs, towers).max(0)

    def spread(assignment: np.ndarray) -> float:
        total = 0.0
        for tower in range(towers):
            own, weight = points[assignment == tower], weights[assignment == tower]
            centre = (own * weight[:, None]).sum(0) / weight.sum()
            total += float((weight * ((own - centre) ** 2).sum(1)).sum())
        return total

    feasible = []
    for choice in itertools.product(range(towers), repeat=units):
        assignment = np.array(choice)
        if len(set(choice)) == towers and fits(assignment, costs, limits, towers):
            feasible.append(spread(assignment))
    found = spread(constrained_kmeans(points, weights, costs, limits, even, towers, seed))
    assert min(feasible) - 1e-9 <= found <= max(1.05 * min(feasible), sorted(feasible)[len(feasible) // 50])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999))
def test_the_even_assignment_is_near_the_best_of_all(seed: int) -> None:
    _, costs = made_up(7, 3, seed)
    best = min(
        float((loads_of(np.array(choice), costs, 3) ** 2).sum())
        for choice in itertools.product(range(3), repeat=7)
        if len(set(choice)) == 3
    )
    found = even_assignment(costs, FREE, 3, seed)
    assert best - 1e-9 <= float((loads_of(found, costs, 3) ** 2).sum()) <= 1.02 * best


def test_even_assignment_keeps_limits_that_the_least_squares_would_not() -> None:
    costs = np.array([[1.2, 0.2, 0], [0.2, 1.2, 0], [0.3, 0.3, 0], [0.3, 0.3, 0]])
    limits = np.array([1.25, np.inf, np.inf])
    found = even_assignment(costs, limits, 2, 1)
    assert fits(found, costs, limits, 2)
    assert (found == found[0]).sum() == 1  # the first alone


def planted(groups: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Interactions of interleaved groups, and the group of every feature."""
    random = np.random.default_rng(5)
    group = np.arange(groups * size) % groups
    noise = random.normal(scale=0.02, size=(len(group), len(group)))
    found = np.where(group[:, None] == group, 0.5, 0.2) + (noise + noise.T) / 2
    np.fill_diagonal(found, 1)
    return found, group


def assigned(interactions: np.ndarray, kind: Kind, towers: int) -> np.ndarray:
    units = len(interactions)
    costs = np.ones((units, 1)) * towers / units
    limits = np.array([1.1])
    plane, _ = place_in_plane(wanted_distances(interactions, kind), seed=1)
    points = coordinates(interactions, towers) if kind == "coherent" else plane
    even = even_assignment(costs, limits, towers, 1)
    return constrained_kmeans(points, np.ones(units), costs, limits, even, towers, 1)


@pytest.mark.parametrize(("groups", "size"), [(2, 5), (4, 6), (6, 8)])
def test_coherent_finds_planted_groups(groups: int, size: int) -> None:
    interactions, group = planted(groups, size)
    found = assigned(interactions, "coherent", groups)
    assert len(set(zip(group.tolist(), found.tolist(), strict=True))) == groups  # one tower a group


@pytest.mark.parametrize(("groups", "size"), [(5, 2), (6, 3)])
def test_diverse_splits_planted_groups(groups: int, size: int) -> None:
    interactions, group = planted(groups, size)
    found = assigned(interactions, "diverse", size)
    for own in range(groups):
        assert len(set(found[group == own].tolist())) == size  # every feature of a group in another tower


def test_a_thousand_features_finish() -> None:
    interactions, group = planted(10, 100)
    found = assigned(interactions, "coherent", 10)
    assert np.bincount(found).max() <= 110
    same = found[:, None] == found
    inside = (group[:, None] == group)[same].mean()
    assert inside > 0.8


def test_baselines() -> None:
    assert largest_first(np.array([5.0, 1, 4, 3, 2]), 2).tolist() == [0, 0, 1, 1, 0]
    assert sorted(largest_first(np.zeros(3), 3).tolist()) == [0, 1, 2]
    found = dealt_round_robin(11, 4, np.random.default_rng(1))
    assert sorted(np.bincount(found).tolist()) == [2, 3, 3, 3]
    assert (found != dealt_round_robin(11, 4, np.random.default_rng(2))).any()
