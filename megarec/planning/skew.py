"""Ids that follow a power law over the rows of a table: how many rows a step touches, and what a cache answers.

    p(r) ~ r^-s      the r-th most popular row; s = SKEW

Ids of click logs are skewed: with s = 1.05, the most popular 1 % of 40 million rows get 82 % of the lookups. Each rank
keeps the rows that it reads most often in its last cache; half of it, beside all else that passes through.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SKEW = 1.05
"""Assumed; not fitted."""
CACHE_SHARE = 0.5
_BINS = 96
Floats = npt.NDArray[np.float64]


class Reads(NamedTuple):
    """Lookups of a table in a step of the whole job.

    Attributes:
        row_bytes: of its weights.
    """

    rows: int
    row_bytes: int
    ids: float


def _mass(rows: Floats) -> Floats:
    """Sum of r^-s over the first so many rows, by its integral."""
    return 1 + (1 - np.maximum(rows, 1.0) ** (1 - SKEW)) / (SKEW - 1)


def touched_rows(rows: int, ids: float) -> float:
    """Rows that some ids touch at least once; each row is as likely as the power law says."""
    edges = np.geomspace(0.5, rows + 0.5, _BINS + 1) if rows > _BINS else np.arange(rows + 1) + 0.5
    middle, width = np.sqrt(edges[1:] * edges[:-1]), np.diff(edges)
    chance = middle**-SKEW
    chance /= float((chance * width).sum())
    return float((-np.expm1(-ids * chance) * width).sum())


def hits(reads: Sequence[Reads], cache_bytes: float) -> float:
    """Share of the looked-up bytes that caches of so many bytes together answer."""
    asked = [table for table in reads if table.ids > 0]
    if not asked or cache_bytes <= 0:
        return 0.0
    rows, size, ids = (np.array([float(table[i]) for table in asked]) for i in range(3))
    mass = _mass(rows)

    def kept(rate: float) -> Floats:
        """Rows that are read at least so often in a step."""
        return np.clip((ids / mass / rate) ** (1 / SKEW), 0.0, rows)

    low, high = 1e-12, float(ids.max())
    for _ in range(80):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if float((kept(middle) * size).sum()) > cache_bytes * CACHE_SHARE else (low, middle)
    own = kept(high)
    answered = ids * np.where(own >= 1, _mass(own), own) / mass
    return min(1.0, float((answered * size).sum() / (ids * size).sum()))
