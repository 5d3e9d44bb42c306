"""How far a fitted curve could be another one: refits to resampled points.

seeds       at each size the runs' deviations from their mean, drawn with replacement
residuals   the sizes' deviations from the curve, drawn with replacement over all sizes

Seeds tell what another training run would change, residuals also what another choice of sizes would. With two or more
runs at every size both are made and the wider one counts; else there are only residuals. Few points hide scatter:
deviations are widened by (n / (n - p))^1/2, what the mean or curve took from them, and by Student's t over the
normal quantile. Without that, 95 % intervals from seven points cover less.
"""

from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import norm, t

from megarec.scaling.fit import FREE, Curve, Fit, Floats, refit

Resampled = Literal["seeds", "residuals"]
CONFIDENCE = 0.95
MIDDLE = (1 + CONFIDENCE) / 2  # the quantile at the interval's upper end
REPLICATES = 400


class Bootstrap(NamedTuple):
    """Refits of one curve, and what was resampled."""

    resampled: Resampled
    curves: tuple[Curve, ...]

    def interval(self, values: list[float]) -> tuple[float, float]:
        """The middle 95 % of a number taken from each refit."""
        low, high = np.quantile(values, [1 - MIDDLE, MIDDLE], method="nearest")
        return float(low), float(high)

    def exponent(self) -> tuple[float, float]:
        return self.interval([curve.exponent for curve in self.curves])

    def band(self, cost: Floats) -> tuple[Floats, Floats]:
        """The 95 % band of the loss over costs [C]."""
        losses = np.stack([curve(cost) for curve in self.curves])
        low, high = np.quantile(losses, [1 - MIDDLE, MIDDLE], axis=0)
        return low, high


def resample(cost: Floats, loss: Floats, fit: Fit, replicates: int = REPLICATES, seed: int = 0) -> Bootstrap:
    """Refits of a curve to `replicates` resamples of runs [R]; `fit` is that of their sizes' means."""
    draws = np.random.default_rng(seed)
    sizes, means = size_means(cost, loss)
    made = [_refits("residuals", sizes, _residuals(sizes, means, fit.curve, replicates, draws), fit)]
    if np.unique(cost, return_counts=True)[1].min() >= 2:
        made.append(_refits("seeds", sizes, _seeds(cost, loss, replicates, draws), fit))
    return max(made, key=lambda bootstrap: np.ptp(bootstrap.exponent()))


def size_means(cost: Floats, loss: Floats) -> tuple[Floats, Floats]:
    """The sizes' costs, rising, and the geometric mean of the losses at each."""
    sizes, place = np.unique(cost, return_inverse=True)
    return sizes, np.exp(np.bincount(place, np.log(loss)) / np.bincount(place))


def widening(points: int, taken: int) -> float:
    """What deviations of `points` from something with `taken` fitted numbers must be multiplied by."""
    freedom = points - taken
    return float((points / freedom) ** 0.5 * t.ppf(MIDDLE, freedom) / norm.ppf(MIDDLE))


def _residuals(sizes: Floats, means: Floats, curve: Curve, replicates: int, draws: np.random.Generator) -> Floats:
    """[replicates, S]: losses of the sizes."""
    expected = np.log(curve(sizes))
    deviation = np.log(means) - expected
    deviation = (deviation - deviation.mean()) * widening(len(sizes), min(FREE[curve.form], len(sizes) - 1))
    return np.exp(expected + draws.choice(deviation, (replicates, len(sizes))))


def _seeds(cost: Floats, loss: Floats, replicates: int, draws: np.random.Generator) -> Floats:
    """[replicates, S]: means of the sizes."""
    sizes = np.unique(cost)
    student = t.ppf(MIDDLE, len(cost) - len(sizes)) / norm.ppf(MIDDLE)  # the sizes' scatters count together
    drawn = []
    for size in sizes:
        logs = np.log(loss[cost == size])
        deviation = (logs - logs.mean()) * (len(logs) / (len(logs) - 1)) ** 0.5 * student
        drawn.append(logs.mean() + draws.choice(deviation, (replicates, len(logs))).mean(axis=1))
    return np.exp(np.stack(drawn, axis=1))


def _refits(resampled: Resampled, sizes: Floats, losses: Floats, fit: Fit) -> Bootstrap:
    return Bootstrap(resampled, tuple(refit(fit.curve, sizes, loss, fit.scatter) for loss in losses))
