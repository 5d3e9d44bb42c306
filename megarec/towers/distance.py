"""How far apart two features shall lie in the plane, by how strongly they interact.

With I the interaction and low, high its extremes over all pairs, s = (I - low) / (high - low):

    coherent   d = 1 - s    features that interact strongly come together
    diverse    d = s        they are parted

DMT (arXiv 2403.00877, tower partitioner) asks for a distance that falls, or rises, with the interaction. Stretching I
over its range is ours: the mean |cosine| of unrelated vectors of width N is not 0 but near sqrt(2 / (pi N)), and in the
narrow band above it 1 - I would ask for nearly equal distances everywhere, which no plane can show.
"""

from typing import Literal

import numpy as np

from megarec.towers.interactions import Matrix

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
