"""Power laws through measured points, robustly and on the logarithmic scale.

    power            L = a C^b
    power+constant   L = a C^b + c, c >= 0: the loss that no compute removes

log L is fitted by least squares with scipy's soft_l1 loss, so that a failed run does not bend the curve: deviations
beyond 1.345 times the points' own scatter count about linearly. Which form describes the points is decided by AICc:
the constant must pay for itself.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Floats = NDArray[np.float64]
Form = Literal["power", "power+constant"]

FREE: dict[Form, int] = {"power": 2, "power+constant": 3}
ROBUST_FROM = 1.345  # standard deviations; Huber's choice
STEEPEST = 10.0  # |b| of power+constant; steeper ones only show that the cheapest point is an outlier
SCALE_ROUNDS = 5
SMALLEST_SCATTER = 1e-7  # of log L: exact points have none, and a scale must not be 0
MAD_TO_DEVIATION = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Curve:
    """L(C) = e^log_scale (C / center)^exponent + constant.

    Attributes:
        center: the points' geometric mean cost; it keeps scale and exponent independent of each other.
    """

    form: Form
    exponent: float
    log_scale: float
    constant: float
    center: float

    def __call__(self, cost: Floats) -> Floats:
        return np.exp(self.log_scale) * (np.asarray(cost) / self.center) ** self.exponent + self.constant

    @property
    def coefficient(self) -> float:
        """a, for C in its own unit."""
        return float(np.exp(self.log_scale - self.exponent * np.log(self.center)))

    def cost_of(self, loss: float) -> float:
        """The cost at which the curve reaches a loss; infinite if it never does."""
        if self.exponent >= 0 or loss <= self.constant:
            return float("inf")
        with np.errstate(over="ignore"):
            return float(self.center * np.exp((np.log(loss - self.constant) - self.log_scale) / self.exponent))

    def gain(self, cost: float, factor: float) -> float:
        """Percent by which the loss changes when the cost grows from `cost` by `factor`."""
        before, after = self(np.array([cost, cost * factor]))
        return float(100 * (after / before - 1))


class Fit(NamedTuple):
    """A curve and how well it describes its points.

    Attributes:
        scatter: robust standard deviation of log L about the curve.
        aicc: lower is better; None with too few points to tell (it needs more than two beyond the parameters).
    """

    curve: Curve
    scatter: float
    aicc: float | None


def fit_forms(cost: Floats, loss: Floats) -> dict[Form, Fit]:
    """Each form's best curve through points [P]; power+constant only from 4 different costs on.

    Both are fitted and compared at one scale of scatter, that about power's line, which starts as plain least
    squares and drops outliers round by round.
    """
    forms: tuple[Form, ...] = ("power", "power+constant") if len(np.unique(cost)) >= 4 else ("power",)
    line = _line(cost, loss)
    for _ in range(SCALE_ROUNDS):
        line = refit(line, cost, loss, _scatter(line, cost, loss))
    scale = _scatter(line, cost, loss)
    return {form: _fit(form, cost, loss, scale) for form in forms}


def chosen(fits: dict[Form, Fit]) -> Form:
    """The form of the lowest AICc; power where there are too few points to compare."""
    rated = [(fit.aicc, form) for form, fit in fits.items() if fit.aicc is not None]
    return min(rated)[1] if len(rated) == len(FREE) else "power"


def refit(curve: Curve, cost: Floats, loss: Floats, scale: float) -> Curve:
    """The same form through other losses at the same costs, searched for from the curve on."""
    start = [curve.log_scale, curve.exponent, curve.constant]
    return _search(curve.form, cost, loss, scale, [start])[0]


def _fit(form: Form, cost: Floats, loss: Floats, scale: float) -> Fit:
    curve, deviance = _search(form, cost, loss, scale, _starts(form, cost, loss))
    points, free = len(cost), FREE[form] + 1  # the scatter is estimated too
    spare = points - free - 1
    aicc = None
    if spare > 0:
        aicc = points * float(np.log(max(deviance / points, SMALLEST_SCATTER**2))) + 2 * free * points / spare
    return Fit(curve, _scatter(curve, cost, loss), aicc)


def _starts(form: Form, cost: Floats, loss: Floats) -> list[list[float]]:
    """log_scale, exponent and constant to search from; for power+constant a few constants below the points."""
    if form == "power":
        line = _line(cost, loss)
        return [[line.log_scale, line.exponent, 0.0]]
    lowest, gap = loss.min(), max(float(np.ptp(loss)), SMALLEST_SCATTER)
    starts = []
    for constant in {max(0.0, lowest - gap * share) for share in (0.03, 0.3, 3.0)}:
        line = _line(cost, loss - constant)
        starts.append([line.log_scale, min(max(line.exponent, -STEEPEST / 2), -1e-6), constant])
    return starts


def _search(form: Form, cost: Floats, loss: Floats, scale: float, starts: list[list[float]]) -> tuple[Curve, float]:
    """The best curve found, and its robust sum of squares, in units of log L."""
    center = float(np.exp(np.log(cost).mean()))
    steps, target = np.log(cost / center), np.log(loss)
    free, width = FREE[form], ROBUST_FROM * scale

    def residuals(at: Floats) -> Floats:
        if form == "power":
            return (at[0] + at[1] * steps - target) / width
        return (np.log(np.exp(at[0] + at[1] * steps) + at[2]) - target) / width

    def jacobian(at: Floats) -> Floats:
        if form == "power":
            return np.stack([np.ones_like(steps), steps], axis=1) / width
        power = np.exp(at[0] + at[1] * steps)
        return np.stack([power, power * steps, np.ones_like(steps)], axis=1) / ((power + at[2]) * width)[:, None]

    bounds = (-np.inf, np.inf) if form == "power" else ([-np.inf, -STEEPEST, 0.0], [np.inf, 0.0, float(loss.max())])
    found = [
        least_squares(residuals, start[:free], jacobian, bounds, loss="soft_l1", x_scale="jac") for start in starts
    ]
    best = min(found, key=lambda result: float(result.cost))
    log_scale, exponent, constant = (*map(float, best.x), 0.0)[:3]
    return Curve(form, exponent, log_scale, constant, center), 2 * float(best.cost) * width**2


def _line(cost: Floats, loss: Floats) -> Curve:
    """Plain least squares of log L on log C."""
    center = float(np.exp(np.log(cost).mean()))
    exponent, log_scale = np.polyfit(np.log(cost / center), np.log(loss), 1)
    return Curve("power", float(exponent), float(log_scale), 0.0, center)


def _scatter(curve: Curve, cost: Floats, loss: Floats) -> float:
    """Standard deviation of log L about a curve, from the median deviation: outliers do not widen it."""
    deviation = np.abs(np.log(loss) - np.log(curve(cost)))
    freedom = max(len(cost) - FREE[curve.form], 1)
    return max(MAD_TO_DEVIATION * float(np.median(deviation)) * (len(cost) / freedom) ** 0.5, SMALLEST_SCATTER)
