"""Seeded order and keys of examples: pure functions of (seed, epoch, row), alike on every machine and topology.

Neither depends on a random generator's state, so a run resumes at any position at once and a permutation of
billions of rows takes no memory.
"""

import math

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits, well mixed."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _stream(seed: int, epoch: int, purpose: int) -> NDArray[np.uint64]:
    """uint64 [1]: the start of an independent stream of numbers."""
    state = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        state = mix64((state ^ np.array([part % 2**64], np.uint64)) + _GOLDEN)
    return state


def example_keys(rows: Int64, seed: int, epoch: int) -> Int64:
    """Int64 [B]: a number per row number and epoch; distinct rows have distinct keys."""
    return mix64(rows.view(np.uint64) * _GOLDEN + _stream(seed, epoch, 1)).view(np.int64)


def permuted(positions: Int64, n: int, seed: int, epoch: int) -> Int64:
    """Rows at these positions of the epoch's permutation of n rows.

    A Feistel network over pairs (l, r) of numbers below a = ceil(sqrt(n)) permutes the a^2 >= n pairs; a result
    of n or more walks on through the network until it is a row (cycle walking: Black and Rogaway 2002, sec. 3).

    Args:
        positions: int64 [B] in [0, n).
    """
    side = np.uint64(math.isqrt(n - 1) + 1)
    keys = mix64(_stream(seed, epoch, 2) + _GOLDEN * np.arange(_ROUNDS, dtype=np.uint64))
    rows = positions.astype(np.uint64)
    walking = np.ones(len(rows), bool)
    while walking.any():
        left, right = np.divmod(rows[walking], side)
        for key in keys:
            left, right = right, (left + mix64(right + key) % side) % side
        rows[walking] = left * side + right
        walking = rows >= n
    return rows.view(np.int64)
