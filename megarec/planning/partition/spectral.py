"""Features that interact strongly as points near each other: spectral coordinates (Ng, Jordan, Weiss 2002).

With I the interactions, r their row sums and T towers: the T leading eigenvectors of I_ij / sqrt(r_i r_j), row by row,
each row scaled to length 1. T groups that interact only inside lie at T points then; in a plane, as in DMT (arXiv
2403.00877), more than three groups cannot lie equally far from each other. The row sums keep a feature with a strong
effect from being near to everything.
"""

import numpy as np
from numpy.typing import NDArray

from megarec.planning.partition.interactions import Matrix
from megarec.planning.partition.mds import NEARLY_ZERO


def coordinates(interactions: Matrix, towers: int) -> NDArray[np.float64]:
    """[F, min(towers, F)], rows of length 1.

    Args:
        interactions: [F, F], symmetric, 0 or more; the diagonal does not count.
    """
    pairs = np.where(np.eye(len(interactions), dtype=bool), 0.0, interactions)
    scale = np.sqrt(np.outer(pairs.sum(1), pairs.sum(1)))
    scaled = np.divide(pairs, scale, out=np.zeros_like(pairs), where=scale > NEARLY_ZERO)
    _, vectors = np.linalg.eigh(scaled)
    leading = vectors[:, -towers:]
    length = np.linalg.norm(leading, axis=1, keepdims=True)
    return np.divide(leading, length, out=np.zeros_like(leading), where=length > NEARLY_ZERO)
