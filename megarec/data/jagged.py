"""Arithmetic of jagged arrays: lists of different lengths, stored one after another."""

import numpy as np
from numpy.typing import NDArray


def flat_positions(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ranges starts[i] .. starts[i] + lengths[i], one after another: int64 [sum(lengths)]."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum(), dtype=np.int64)
