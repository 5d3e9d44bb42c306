"""Is a family's curve a law? Its exponent with an interval, and what it predicts; or why it is not called one.

The interval is that of refits to resampled points:

seeds       at each size the runs' deviations from their mean, drawn with replacement
residuals   the sizes' deviations from the curve, drawn with replacement over all sizes

Seeds show what another training run would change, residuals also what another choice of sizes would. With two or more
runs at every size both are made and the wider one counts; else there are only residuals. Few points hide scatter:
deviations are widened by (n / (n - p))^1/2, what the mean or curve took from them, and by Student's t over the
normal quantile. Without that, 95 % intervals from seven points cover less.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import norm, t

from megarec.scaling.fit import FREE, STEEPEST, Curve, Fit, Floats, Form, chosen, fit_forms, refit
from megarec.scaling.points import UNIT, Axis, Run

Resampled = Literal["seeds", "residuals"]
CONFIDENCE = 0.95
MIDDLE = (1 + CONFIDENCE) / 2  # the quantile at the interval's upper end
REPLICATES = 400
FEWEST_SIZES = 4
LEAST_SPAN = 10.0  # largest cost over smallest
SIGNIFICANT_PERCENT = 0.02  # the LogLoss difference that counts, arXiv 2403.02545
STEP = 4.0  # the paper states its law for each 4x of compute


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


class HeldOut(NamedTuple):
    """The largest sizes predicted by a fit to the smaller ones, which choose their form by themselves.

    Attributes:
        form: what they chose; with fewer than six of them power.
        costs, percents: what was held out, and the error of each: predicted over measured, less 1.
    """

    form: Form
    costs: tuple[float, ...]
    percents: tuple[float, ...]


@dataclass(frozen=True)
class NoLaw:
    """Too little evidence for a law."""

    sizes: int
    reason: str


@dataclass(frozen=True)
class Law:
    """A family's curve.

    Attributes:
        fits: both forms, where both can be fitted; `form` is the one that was chosen.
        per_step: percent by which the loss changes over the next 4x beyond the largest size, and its interval.
        held_out: of the largest size, and of the largest two; as far as at least four sizes remain.
    """

    sizes: int
    runs: int
    span: tuple[float, float]
    fits: dict[Form, Fit]
    form: Form
    bootstrap: Bootstrap
    exponent_interval: tuple[float, float]
    per_step: float
    per_step_interval: tuple[float, float]
    held_out: tuple[HeldOut, ...]

    @property
    def curve(self) -> Curve:
        return self.fits[self.form].curve

    @property
    def extrapolation_error(self) -> float | None:
        """The largest error of what was held out, in percent, without its sign."""
        return max((abs(percent) for held in self.held_out for percent in held.percents), default=None)

    @property
    def forms_differ(self) -> bool:
        """Whether AICc prefers one form clearly: by 2 or more."""
        rated = [fit.aicc for fit in self.fits.values() if fit.aicc is not None]
        return len(rated) == 2 and abs(rated[0] - rated[1]) >= 2


def find_law(runs: tuple[Run, ...], axis: Axis = "gflop", replicates: int = REPLICATES) -> Law | NoLaw:
    """Fit the means of a family's sizes.

    A size is one point however many runs it has: seeds repeat how its model deviates from the curve, and counted
    each they would let power+constant follow that.

    Refused are fewer than four sizes, less than a decade between the smallest and the largest, an exponent whose
    95 % interval reaches 0 (the loss may not fall at all), and a loss that levels off.
    """
    cost, loss = np.array(runs, dtype=np.float64).T
    sizes, means = size_means(cost, loss)
    if len(sizes) < FEWEST_SIZES:
        return NoLaw(len(sizes), f"{len(sizes)} size{'s' * (len(sizes) > 1)} measured, a law needs {FEWEST_SIZES}")
    if sizes[-1] / sizes[0] < LEAST_SPAN:
        span = f"{sizes[0]:g} to {sizes[-1]:g} {UNIT[axis]}, {sizes[-1] / sizes[0]:.2g}x"
        return NoLaw(len(sizes), f"less than a decade of {_noun(axis)} ({span}), a law needs {LEAST_SPAN:g}x")
    fits = fit_forms(sizes, means)
    form = chosen(fits)
    bootstrap = resample(cost, loss, fits[form], replicates)
    interval = bootstrap.exponent()
    if interval[1] >= 0:
        return NoLaw(
            len(sizes), f"the exponent's 95 % interval [{interval[0]:.3g}, {interval[1]:.3g}] does not lie below 0"
        )
    largest = float(sizes[-1])
    per_step = fits[form].curve.gain(largest, STEP)
    if form == "power+constant" and (interval[0] <= -0.99 * STEEPEST or per_step > -SIGNIFICANT_PERCENT):
        return NoLaw(
            len(sizes),
            f"it levels off at {fits[form].curve.constant:.5g}: the next 4x would change the loss by {per_step:+.3f} %",
        )
    return Law(
        len(sizes),
        len(runs),
        (float(sizes[0]), largest),
        fits,
        form,
        bootstrap,
        interval,
        per_step,
        bootstrap.interval([curve.gain(largest, STEP) for curve in bootstrap.curves]),
        tuple(_hold_out(sizes, means, number) for number in (1, 2) if len(sizes) - number >= FEWEST_SIZES),
    )


def _hold_out(sizes: Floats, means: Floats, number: int) -> HeldOut:
    fits = fit_forms(sizes[:-number], means[:-number])
    form = chosen(fits)
    percents = 100 * (fits[form].curve(sizes[-number:]) / means[-number:] - 1)
    return HeldOut(form, tuple(map(float, sizes[-number:])), tuple(map(float, percents)))


def _noun(axis: Axis) -> str:
    return "compute" if axis == "gflop" else "parameters"
