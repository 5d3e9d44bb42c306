"""AUC, LogLoss, NE and calibration of rows that count several times: what a bootstrap computes repeatedly.

Sorted once by score, every draw is a few passes over the rows, and the AUC is exact, ties included.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megarec.metrics.grouped import places_of

Float = NDArray[np.float64]
EXAMPLE_METRICS = ("auc", "logloss", "ne", "calibration")


def losses_of(logits: NDArray[Any], labels: NDArray[Any]) -> Float:
    """Binary cross-entropy of every row, in nats: float64 [N]."""
    x = logits.astype(np.float64)
    found: Float = np.maximum(x, 0) - x * labels + np.log1p(np.exp(-np.abs(x)))
    return found


def probabilities_of(logits: NDArray[Any]) -> Float:
    """Their sigmoid: float64 [N]."""
    x = logits.astype(np.float64)
    small = np.exp(-np.abs(x))
    found: Float = np.where(x >= 0, 1 / (1 + small), small / (1 + small))
    return found


def entropy_of(rate: float) -> float:
    """Of a label that is 1 with this probability, in nats; 0 where it is certain."""
    return 0.0 if rate in (0.0, 1.0) else -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)


def of_sums(examples: float, positives: float, loss: float, predicted: float) -> tuple[float, float, float]:
    """LogLoss, NE and calibration of sums over rows; NaN where there is none."""
    if not examples:
        return math.nan, math.nan, math.nan
    entropy = entropy_of(positives / examples)
    logloss = loss / examples
    return logloss, logloss / entropy if entropy else math.nan, predicted / positives if positives else math.nan


def _ascending(scores: NDArray[Any]) -> NDArray[np.int64]:
    """Rows in the order of their scores; of float32 by one sort of numbers that are place and row."""
    if scores.dtype != np.float32 or len(scores) >= 1 << 32:
        return np.argsort(scores)
    keys = places_of(scores).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(len(scores), dtype=np.uint64)
    keys.sort()
    keys &= np.uint64(0xFFFFFFFF)
    return keys.view(np.int64)


class WeightedRows:
    """Logits and labels, ready for draws.

    Args:
        logits: float [N], finite.
        labels: 0 or 1 [N].
    """

    def __init__(self, logits: NDArray[Any], labels: NDArray[Any]) -> None:
        assert logits.shape == labels.shape and logits.ndim == 1
        self._order = _ascending(logits)
        scores = logits[self._order]
        self._positive = labels[self._order].astype(bool)
        starts = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]])) if len(scores) else self._order
        self._levels = None if len(starts) == len(scores) else starts  # None: no two rows tie
        self._sums = np.stack([labels.astype(np.float64), losses_of(logits, labels), probabilities_of(logits)])

    def __len__(self) -> int:
        return len(self._order)

    def metrics(self, times: NDArray[Any] | None = None) -> Float:
        """`EXAMPLE_METRICS`, in this order; NaN where there is none.

        Args:
            times: how often each row counts, whole numbers [N]; None: once.
        """
        counted = np.ones(len(self), np.int64) if times is None else times
        examples = int(counted.sum())
        positives, loss, predicted = self._sums @ counted
        return np.array([self._auc(counted[self._order]), *of_sums(examples, positives, loss, predicted)])

    def _auc(self, times: NDArray[Any]) -> float:
        hits = np.where(self._positive, times, 0)
        misses = times - hits
        if self._levels is not None:
            hits, misses = np.add.reduceat(hits, self._levels), np.add.reduceat(misses, self._levels)
        positives, negatives = int(hits.sum()), int(misses.sum())
        if not positives or not negatives:
            return math.nan
        below = np.cumsum(misses)
        below *= 2
        below -= misses  # twice those below, and the tied ones once
        return int(hits @ below) / (2 * positives * negatives)
