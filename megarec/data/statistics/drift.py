"""How far a split's values lie from those of training: Jensen-Shannon divergence, beside what chance alone gives.

The divergence is in bits: 0 where both are distributed alike, 1 where they have no value in common. Two samples of one
distribution differ as well, the more the smaller they are. With B buckets and n and m examples the divergence of such
samples, times 8 ln 2 / (1/n + 1/m), is nearly chi-square with B - 1 degrees of freedom; `noise` is the value that it
exceeds with the given probability. Buckets are chosen by both samples together, so that the choice favours neither,
and each has at least EXPECTED examples of the smaller sample.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri  # chi2.isf of scipy.stats, which takes a second to import

BUCKETS = 1000  # of ids: the most frequent, each by itself or with some as frequent
CANDIDATES = BUCKETS + 1  # one more shows below which frequency not all ids have a bucket
NUMBER_BUCKETS = 100
_ODD = 0x9E3779B97F4A7C15  # scatters neighbours over 64 bits
EXPECTED = 10.0  # examples of the smaller sample in a bucket
ALONE = 4.0  # of an id: what is rarer is often in one sample only, as a vocabulary knows no other than training's
FALSE_ALARMS = 0.001  # on average among all features of a report, where nothing has drifted


@dataclass(frozen=True)
class Drift:
    """Of a feature between training and another split.

    Attributes:
        divergence: Jensen-Shannon, in bits.
        noise: what two samples of one distribution would rarely exceed, in bits.
        buckets: that were compared; fewer than 2: all values are equal, or none is frequent enough.
    """

    divergence: float = 0.0
    noise: float = 0.0
    buckets: int = 0

    @property
    def excess(self) -> float:
        """How far the divergence is above the noise; at most 0: nothing is seen."""
        return self.divergence - self.noise

    @property
    def order(self) -> tuple[float, float]:
        """Sort key, most drifted first: by excess; below the noise, by the distance to it."""
        return -max(self.excess, 0.0), -self.divergence / self.noise if self.noise else 0.0


def drift_of_ids(
    rows: NDArray[np.int64],
    counts: NDArray[np.int64],
    values: tuple[int, int],
    examples: tuple[int, int],
    probability: float,
) -> Drift:
    """Between two samples of ids.

    Args:
        rows: [n], candidates for buckets: the CANDIDATES ids that are the most frequent in both together, or all.
        counts: [2, n], how often each is there.
        values: of each sample, the sum of all counts; what is not among the candidates is one bucket.
        examples: of each sample, how many are independent: of lists, the rows.
        probability: of a divergence above the noise, where there is no drift.
    """
    if not min(*examples, *values):
        return Drift()
    each = sum(values) / min(examples)  # counts in both samples for one example of the smaller
    total = counts.sum(axis=0)
    # A vocabulary has training's most frequent ids first: equally frequent ids must not be in the order of their rows.
    order = np.lexsort((rows.astype(np.uint64) * np.uint64(_ODD), -total))
    least = max(ALONE * each, total[order[BUCKETS]] + 1 if len(order) > BUCKETS else 0)
    head = counts[:, order[total[order] >= least]]
    rest = np.array(values)[:, None] - head.sum(axis=1, keepdims=True)
    return _between(_buckets(np.hstack([head, rest]), EXPECTED * each), examples, probability)


def drift_of_numbers(
    first: tuple[NDArray[np.float64], NDArray[np.int64]],
    second: tuple[NDArray[np.float64], NDArray[np.int64]],
    probability: float,
) -> Drift:
    """Between two samples of numbers: each is its distinct numbers in their order, and how often each is there."""
    examples = (int(first[1].sum()), int(second[1].sum()))
    if not min(examples):
        return Drift()
    numbers = np.union1d(first[0], second[0])
    counts = np.zeros((2, len(numbers)), np.int64)
    for row, (own, times) in zip(counts, (first, second), strict=True):
        row[np.searchsorted(numbers, own)] = times
    least = max(EXPECTED * sum(examples) / min(examples), sum(examples) / NUMBER_BUCKETS)
    return _between(_buckets(counts, least), examples, probability)


def _buckets(counts: NDArray[np.int64], least: float) -> NDArray[np.int64]:
    """Merge neighbours until a bucket has enough of both samples."""
    starts, inside = [0], 0
    for place, more in enumerate(counts.sum(axis=0).tolist()):
        if inside >= least:
            starts.append(place)
            inside = 0
        inside += more
    if inside < least and len(starts) > 1:
        starts.pop()
    return np.add.reduceat(counts, starts, axis=1)


def _between(counts: NDArray[np.int64], examples: tuple[int, int], probability: float) -> Drift:
    """Of the counts [2, B] of B buckets."""
    shares = counts / counts.sum(axis=1, keepdims=True)
    middle = shares.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shares > 0, shares * np.log2(shares / middle), 0.0)
    divergence = max(0.0, float(terms.sum()) / 2)
    buckets = int(np.count_nonzero(middle))
    if buckets < 2:
        return Drift(buckets=buckets)
    scale = (1 / examples[0] + 1 / examples[1]) / (8 * math.log(2))
    return Drift(divergence, min(1.0, scale * float(chdtri(buckets - 1, probability))), buckets)
