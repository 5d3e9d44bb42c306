"""How well predicted probabilities are rates: the reliability curve, and calibration fitted on other rows.

A temperature (Guo et al. 2017) divides all logits by one number, which changes no order. A histogram (Zadrozny and
Elkan 2001) gives every prediction the rate of its bin, which changes the order inside bins; bins hold equally many of
the rows that they are fitted on.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from megarec.metrics.weighted import Float, losses_of, probabilities_of

_HOTTEST, _COLDEST = -7.0, 7.0  # log(1 / temperature)
_BINS, _ROWS_OF_A_BIN = 100, 200  # of a histogram: at most that many bins, of at least that many rows


@dataclass(frozen=True)
class Temperature:
    """Divides logits.

    Attributes:
        temperature: above 1: the model was too sure. Between 1e-3 and 1e3.
    """

    temperature: float

    def logloss(self, logits: NDArray[Any], labels: NDArray[Any]) -> float:
        """Of these rows after calibration, in nats."""
        return float(losses_of(logits / self.temperature, labels).mean())


def fit_temperature(logits: NDArray[Any], labels: NDArray[Any]) -> Temperature:
    """The temperature with the least LogLoss on these rows.

    Args:
        logits: float [N], finite, N >= 1.
        labels: 0 or 1 [N].
    """
    x = logits.astype(np.float64)

    def slope(log_factor: float) -> float:
        return float((x * (probabilities_of(x * math.exp(log_factor)) - labels)).mean())

    if slope(_HOTTEST) >= 0:  # the logits are useless, or wrong
        return Temperature(math.exp(-_HOTTEST))
    if slope(_COLDEST) <= 0:  # no error among them
        return Temperature(math.exp(-_COLDEST))
    return Temperature(math.exp(-brentq(slope, _HOTTEST, _COLDEST, xtol=1e-9)))


@dataclass(frozen=True)
class Histogram:
    """Turns a logit into the rate of its bin.

    Attributes:
        edges: float64 [bins - 1], ascending: a bin ends before the next one's first logit.
        rates: float64 [bins], strictly between 0 and 1.
    """

    edges: Float
    rates: Float

    def logloss(self, logits: NDArray[Any], labels: NDArray[Any]) -> float:
        """Of these rows after calibration, in nats."""
        rates = self.rates[np.searchsorted(self.edges, logits, side="right")]
        return float(-np.log(np.where(labels > 0.5, rates, 1 - rates)).mean())


def fit_histogram(logits: NDArray[Any], labels: NDArray[Any]) -> Histogram:
    """The rates of at most 100 bins of at least 200 of these rows, ties together.

    A bin's rate is as if it had one more row, with the rate of all rows (itself as if there were two more, one of each
    label): no bin is certain, as one row of the other label would then cost without end.

    Args:
        logits: float [N], finite, N >= 1.
        labels: 0 or 1 [N].
    """
    edges = _equal_edges(logits, min(_BINS, len(logits) // _ROWS_OF_A_BIN))
    examples, positives = _counts(edges, logits, labels)
    rate = (positives.sum() + 1) / (examples.sum() + 2)
    return Histogram(edges, (positives + rate) / (examples + 1))


def _equal_edges(logits: NDArray[Any], bins: int) -> Float:
    places = np.arange(1, bins) * len(logits) // max(bins, 1)
    if not len(places):
        return np.empty(0)
    edges: Float = np.unique(np.partition(logits, places)[places]).astype(np.float64)
    return edges[edges > logits.min()]


def _counts(edges: Float, logits: NDArray[Any], labels: NDArray[Any]) -> tuple[Float, Float]:
    """Examples and positives by bin."""
    of_row = np.searchsorted(edges, logits, side="right")
    size = len(edges) + 1
    examples, positives = (np.bincount(of_row, weights, size) for weights in (np.ones(len(of_row)), labels))
    return examples.astype(np.float64), positives.astype(np.float64)


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows of neighbouring predictions.

    Attributes:
        predicted: mean probability.
        observed: share of positives, with its 95 % interval (Wilson's).
    """

    examples: int
    predicted: float
    observed: float
    low: float
    high: float


def reliability(logits: NDArray[Any], labels: NDArray[Any], bins: int = 20) -> list[ReliabilityBin]:
    """The reliability curve: predicted probability and observed rate in bins of equally many rows, ties together."""
    if not len(logits):
        return []
    edges = _equal_edges(logits, min(bins, len(logits)))
    examples, positives = _counts(edges, logits, labels)
    predicted = np.bincount(
        np.searchsorted(edges, logits, side="right"), probabilities_of(logits), minlength=len(examples)
    )
    rows = zip(examples.tolist(), predicted.tolist(), positives.tolist(), strict=True)
    return [_bin(n, total, hits) for n, total, hits in rows if n]


def _bin(examples: float, predicted: float, positives: float) -> ReliabilityBin:
    z = 1.959963984540054
    rate, extra = positives / examples, z * z / examples
    middle = (rate + extra / 2) / (1 + extra)
    half = z * math.sqrt(rate * (1 - rate) / examples + extra / (4 * examples)) / (1 + extra)
    return ReliabilityBin(int(examples), predicted / examples, rate, max(0.0, middle - half), min(1.0, middle + half))
