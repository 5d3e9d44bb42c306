"""Clusters of points under limits on several costs: constrained k-means, and the most even assignment.

Both are one local search over moves of a point and swaps of two. It minimises

    sum over points of distance[point, its cluster]  +  sum over clusters of penalty(load of the cluster)

k-means (Lloyd's alternation): the distance is the squared one to the centroid, the penalty is steep above a limit and 0
below. The most even assignment: no distance, the squared loads as penalty.

Shape letters: U points, K kinds of cost, T clusters. Costs and loads are in multiples of a cluster's mean load.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Assignment = NDArray[np.int64]
Penalty = Callable[[Floats], Floats]

STARTS, STARTS_OF_MANY = 8, 3  # of many points each start finds much the same
MANY = 300
MAX_ROUNDS = 60
STEEP = 1e3  # against a sum of squared distances that is scaled to about 1
ROUNDING = 1e-9


def loads_of(assignment: Assignment, costs: Floats, clusters: int) -> Floats:
    """[T, K]: what each cluster holds."""
    loads = np.zeros((clusters, costs.shape[1]))
    np.add.at(loads, assignment, costs)
    return loads


def fits(assignment: Assignment, costs: Floats, limits: Floats, clusters: int) -> bool:
    """Whether no load exceeds its limit [K]."""
    return bool((_excess(loads_of(assignment, costs, clusters), limits) == 0).all())


def even_assignment(costs: Floats, limits: Floats, clusters: int, seed: int) -> Assignment:
    """[U]: within the limits [K] if the search finds that, and then with the least sum of squared loads.

    Args:
        costs: [U, K], U >= T.
    """

    def penalty(loads: Floats) -> Floats:
        return STEEP * _excess(loads, limits) + (loads**2).sum(-1)

    random = np.random.default_rng([seed, 3])
    nowhere = np.zeros((len(costs), clusters))
    best, best_value = None, np.inf
    for start in range(_starts(costs)):
        assignment = (
            largest_first(costs.sum(1), clusters) if start == 0 else dealt_round_robin(len(costs), clusters, random)
        )
        for _ in range(MAX_ROUNDS):
            if not _improve(assignment, nowhere, costs, penalty, random):
                break
        value = float(penalty(loads_of(assignment, costs, clusters)).sum())
        if value < best_value - ROUNDING:
            best, best_value = assignment, value
    assert best is not None
    return best


def constrained_kmeans(
    points: Floats, weights: Floats, costs: Floats, limits: Floats, even: Assignment, clusters: int, seed: int
) -> Assignment:
    """[U]: the assignment with the least weighted sum of squared distances to centroids that was found in the limits.

    Args:
        points: [U, 2], U >= T.
        weights: [U], how much a point counts.
        costs: [U, K].
        limits: [K], of every cluster.
        even: an assignment that keeps the limits; one of the starts, so that there is always a result.
    """

    def penalty(loads: Floats) -> Floats:
        return STEEP * _excess(loads, limits)

    centre = np.average(points, axis=0, weights=weights)
    scale = float((weights * ((points - centre) ** 2).sum(1)).sum()) or 1.0
    random = np.random.default_rng([seed, 4])
    best, best_value = even, np.inf
    for start in range(_starts(costs)):
        assignment = even.copy() if start == 0 else _nearest_seeds(points, weights, clusters, random)
        for _ in range(MAX_ROUNDS):
            distances = _squared_distances(points, weights, assignment, clusters) / scale
            if not _improve(assignment, distances, costs, penalty, random):
                break
        distances = _squared_distances(points, weights, assignment, clusters) / scale
        value = float(distances[np.arange(len(points)), assignment].sum())
        if value < best_value - ROUNDING and fits(assignment, costs, limits, clusters):
            best, best_value = assignment, value
    return best


def _starts(costs: Floats) -> int:
    return STARTS if len(costs) <= MANY else STARTS_OF_MANY


def _excess(loads: Floats, limits: Floats) -> Floats:
    """[...] by how much loads [..., K] exceed their limits, as a share of them, summed over the kinds."""
    over = loads / limits - 1
    return np.where(over > ROUNDING, over, 0).sum(-1)


def _improve(
    assignment: Assignment, distances: Floats, costs: Floats, penalty: Penalty, random: np.random.Generator
) -> bool:
    """One pass over the points in random order, each taking its best move or swap; changes `assignment` in place."""
    clusters = distances.shape[1]
    loads = loads_of(assignment, costs, clusters)
    sizes = np.bincount(assignment, minlength=clusters)
    points = np.arange(len(assignment))
    changed = False
    for i in random.permutation(len(assignment)):
        s = assignment[i]
        now = penalty(loads)
        if not now.any() and distances[i, s] <= distances[i].min():
            continue  # any exchange that helps is seen from the other point
        without, cost = loads[s] - costs[i], costs[i]
        moves = distances[i, s] - distances[i] + now[s] + now - penalty(without) - penalty(loads + cost)
        moves[s] = 0
        if sizes[s] == 1:
            moves[:] = -np.inf  # no cluster may be empty
        t = assignment
        swaps = distances[i, s] - distances[i, t] + distances[points, t] - distances[:, s] + now[s] + now[t]
        swaps -= penalty(without + costs) + penalty(loads[t] - costs + cost)
        swaps[t == s] = 0
        move, swap = int(moves.argmax()), int(swaps.argmax())
        if max(moves[move], swaps[swap]) <= ROUNDING:
            continue
        changed = True
        to = move if moves[move] >= swaps[swap] else int(t[swap])
        if moves[move] < swaps[swap]:
            assignment[swap] = s
            loads[s] += costs[swap]
            loads[to] -= costs[swap]
        else:
            sizes[s] -= 1
            sizes[to] += 1
        assignment[i] = to
        loads[s] -= cost
        loads[to] += cost
    return changed


def _squared_distances(points: Floats, weights: Floats, assignment: Assignment, clusters: int) -> Floats:
    """[U, T]: weight x squared distance to each centroid."""
    total = np.bincount(assignment, weights, clusters)
    centroids = (
        np.stack([np.bincount(assignment, weights * axis, clusters) for axis in points.T], axis=1) / total[:, None]
    )
    return weights[:, None] * ((points[:, None] - centroids) ** 2).sum(2)


def _nearest_seeds(points: Floats, weights: Floats, clusters: int, random: np.random.Generator) -> Assignment:
    """Every point goes to the nearest of T seeds, far from each other (k-means++, Arthur and Vassilvitskii 2007)."""
    seeds = [int(random.choice(len(points), p=weights / weights.sum()))]
    while len(seeds) < clusters:
        away = weights * ((points[:, None] - points[seeds]) ** 2).sum(2).min(1)
        away[seeds] = 0
        free = np.setdiff1d(np.arange(len(points)), seeds)
        chance = away / away.sum() if away.sum() > 0 else np.isin(np.arange(len(points)), free) / len(free)
        seeds.append(int(random.choice(len(points), p=chance)))
    assignment = ((points[:, None] - points[seeds]) ** 2).sum(2).argmin(1)
    assignment[seeds] = np.arange(clusters)
    return assignment.astype(np.int64)


def largest_first(costs: Floats, clusters: int) -> Assignment:
    """[U]: each point, the most expensive first, to the cluster with the least cost so far; none stays empty.

    Args:
        costs: [U], U >= T.
    """
    assignment = np.zeros(len(costs), dtype=np.int64)
    load, held = np.zeros(clusters), np.zeros(clusters, dtype=np.int64)
    for i in np.argsort(-costs, kind="stable"):
        to = np.lexsort((held, load))[0]
        assignment[i] = to
        load[to] += costs[i]
        held[to] += 1
    return assignment


def dealt_round_robin(points: int, clusters: int, random: np.random.Generator) -> Assignment:
    """[U]: in random order, one to each cluster in turn."""
    assignment = np.empty(points, dtype=np.int64)
    assignment[random.permutation(points)] = np.arange(points) % clusters
    return assignment
