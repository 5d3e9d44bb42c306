"""Is a family's curve a law? Its exponent with an interval, and what it foretells; or why it is not called one."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megarec.scaling.bootstrap import REPLICATES, Bootstrap, resample, size_means
from megarec.scaling.fit import STEEPEST, Curve, Fit, Floats, Form, chosen, fit_forms
from megarec.scaling.points import UNIT, Axis, Run

FEWEST_SIZES = 4
LEAST_SPAN = 10.0  # largest cost over smallest
SIGNIFICANT_PERCENT = 0.02  # the LogLoss difference that counts, arXiv 2403.02545
STEP = 4.0  # the paper states its law for each 4x of compute


class HeldOut(NamedTuple):
    """The largest sizes foretold by a fit to the smaller ones, which choose their form by themselves.

    Attributes:
        form: what they chose; with fewer than six of them power.
        costs, percents: what was held out, and the error of each: foretold over measured, less 1.
    """

    form: Form
    costs: tuple[float, ...]
    percents: tuple[float, ...]


@dataclass(frozen=True)
class NoLaw:
    """Too little to claim a law by."""

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
