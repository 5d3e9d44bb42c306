"""Features in the plane, as far apart as wanted: metric multidimensional scaling by SMACOF.

Stress is reduced by majorization (de Leeuw 1977; Borg and Groenen, Modern Multidimensional Scaling, chapter 8): with
unit weights each step is the Guttman transform X <- B(X) X / F, and no step raises the stress. The first start is
classical scaling, the others are random; the lowest stress wins.

How far apart two features shall lie follows from how strongly they interact. With I the interaction and low, high its
extremes over all pairs, s = (I - low) / (high - low):

    coherent   d = 1 - s    features that interact strongly come together
    diverse    d = s        they are parted

DMT (arXiv 2403.00877, tower partitioner) asks for a distance that falls, or rises, with the interaction. Stretching I
over its range is ours: the mean |cosine| of unrelated vectors of width N is not 0 but near sqrt(2 / (pi N)), and in the
narrow band above it 1 - I would ask for nearly equal distances everywhere, which no plane can show.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megarec.planning.partition.interactions import Matrix

RANDOM_STARTS = 1
MAX_STEPS = 300
TOLERANCE = 1e-4  # relative fall of the stress below which a start has settled
NEARLY_ZERO = 1e-12


def place_in_plane(distances: Matrix, seed: int) -> tuple[NDArray[np.float64], float]:
    """Points [F, 2], centred, and the stress that is left.

    Args:
        distances: wanted ones, [F, F], symmetric, 0 on the diagonal.

    Returns:
        The stress is sqrt(sum (d - wanted)^2 / sum wanted^2) over all pairs: 0 where the plane shows all distances.
    """
    random = np.random.default_rng([seed, 2])
    spread = distances.mean() or 1.0
    starts = [_classical_scaling(distances)]
    starts += [random.normal(scale=spread, size=(len(distances), 2)) for _ in range(RANDOM_STARTS)]
    return min((_smacof(distances, start) for start in starts), key=lambda found: found[1])


def _classical_scaling(distances: Matrix) -> NDArray[np.float64]:
    """The two leading principal coordinates (Torgerson 1952)."""
    squares = distances**2
    centred = -(squares - squares.mean(0) - squares.mean(1)[:, None] + squares.mean()) / 2
    values, vectors = np.linalg.eigh(centred)
    leading = slice(-1, -3, -1)
    points = np.zeros((len(distances), 2))
    found = vectors[:, leading] * np.sqrt(np.maximum(values[leading], 0))
    points[:, : found.shape[1]] = found
    return points


def _smacof(distances: Matrix, points: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    wanted = (distances**2).sum() or 1.0
    points = points - points.mean(0)
    stress = np.inf
    for _ in range(MAX_STEPS):
        reached = _euclidean(points)
        before, stress = stress, float(np.sqrt(((reached - distances) ** 2).sum() / wanted))
        if stress < NEARLY_ZERO or before - stress < TOLERANCE * stress:
            break
        ratio = np.divide(distances, reached, out=np.zeros_like(reached), where=reached > NEARLY_ZERO)
        points = (ratio.sum(1)[:, None] * points - ratio @ points) / len(points)  # B(X) X / F
    return points, stress


def _euclidean(points: NDArray[np.float64]) -> Matrix:
    x, y = (points[:, axis][:, None] - points[:, axis] for axis in range(2))
    return np.sqrt(x * x + y * y)  # np.hypot is many times slower


Kind = Literal["coherent", "diverse"]


def wanted_distances(interactions: Matrix, kind: Kind) -> Matrix:
    """[F, F] in [0, 1], 0 on the diagonal; all 1 where all pairs interact alike."""
    pairs = interactions[~np.eye(len(interactions), dtype=bool)]
    low, high = (pairs.min(), pairs.max()) if pairs.size else (0.0, 0.0)
    if high - low < 1e-12:
        distances = np.ones_like(interactions)
    else:
        stretched = (interactions - low) / (high - low)
        distances = 1 - stretched if kind == "coherent" else stretched
    np.fill_diagonal(distances, 0)
    return distances
