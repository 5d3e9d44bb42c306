"""Families beside each other: does one still improve at its large end, and what does equal quality cost?"""

from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import norm, t

from megarec.scaling.bootstrap import MIDDLE, size_means
from megarec.scaling.fit import Floats
from megarec.scaling.law import SIGNIFICANT_PERCENT, STEP, Law, NoLaw
from megarec.scaling.points import Run

END_SIZES = 3
SIGNIFICANT_SLOPE = float(np.log1p(-SIGNIFICANT_PERCENT / 100) / np.log(STEP))  # d ln L / d ln C


class LargeEnd(NamedTuple):
    """How a family's loss moves over its last three sizes (two, if there are no more).

    Attributes:
        slope: d ln L / d ln C by least squares over these sizes, the local exponent.
        interval: 95 %, by the runs' deviations where sizes have several ("seeds"), else ("reference") with
            differences between two sizes of up to 0.02 % taken for noise.
        verdict: "improves": the interval lies below 0. "saturated": it reaches 0 and excludes that the next 4x lowers
            the loss by more than 0.02 %. "open": the runs scatter too much to tell.
    """

    span: tuple[float, float]
    slope: float
    interval: tuple[float, float]
    noise: Literal["seeds", "reference"]

    @property
    def verdict(self) -> Literal["improves", "saturated", "open"]:
        if self.interval[1] < 0:
            return "improves"
        return "saturated" if self.interval[0] >= SIGNIFICANT_SLOPE else "open"


class EqualQuality(NamedTuple):
    """What the reference family needs for another family's best quality.

    Attributes:
        cost, loss: the other family's best size.
        between: the reference's cost by its own measured sizes, straight lines between them on the log-log scale;
            None where they do not reach that quality or are all better.
        by_law, by_law_interval: the same by the reference's law; infinite where it never gets there. The interval is
            the law's alone: the other family's quality counts as exact.
        extrapolated: `by_law` lies outside the reference's measured sizes.
    """

    family: str
    cost: float
    loss: float
    between: float | None
    by_law: float | None
    by_law_interval: tuple[float, float] | None
    extrapolated: bool

    @property
    def times_by_law(self) -> float | None:
        """The other family's cost over the reference's by its law; None where that says nothing in numbers."""
        if self.by_law is None or not 0 < self.by_law < float("inf"):
            return None
        times = self.cost / self.by_law
        return times if np.isfinite(times) else None


def large_end(runs: tuple[Run, ...]) -> LargeEnd | None:
    """The local slope at the large end; None for a single size."""
    cost, loss = np.array(runs, dtype=np.float64).T
    sizes, means = size_means(cost, loss)
    if len(sizes) < 2:
        return None
    sizes, means = sizes[-END_SIZES:], means[-END_SIZES:]
    steps = np.log(sizes) - np.log(sizes).mean()
    leverage = steps / (steps**2).sum()
    slope = float(leverage @ np.log(means))
    deviation, quantile, noise = _noise(cost, loss, sizes)
    half = quantile * float(np.sqrt((leverage**2 * deviation**2).sum()))
    return LargeEnd((float(sizes[0]), float(sizes[-1])), slope, (slope - half, slope + half), noise)


def equal_quality(family: str, runs: tuple[Run, ...], reference: tuple[Run, ...], law: Law | NoLaw) -> EqualQuality:
    """The reference family's compute for the best quality of `family`."""
    sizes, means = size_means(*np.array(runs, dtype=np.float64).T)
    best = int(means.argmin())
    cost, loss = float(sizes[best]), float(means[best])
    between = _between(*size_means(*np.array(reference, dtype=np.float64).T), loss)
    if isinstance(law, NoLaw):
        return EqualQuality(family, cost, loss, between, None, None, False)
    needed = law.curve.cost_of(loss)
    interval = law.bootstrap.interval([curve.cost_of(loss) for curve in law.bootstrap.curves])
    return EqualQuality(family, cost, loss, between, needed, interval, not law.span[0] <= needed <= law.span[1])


def frontier(families: dict[str, tuple[Run, ...]]) -> list[tuple[str, float, float]]:
    """Family, cost and mean loss of each size that none at its cost or less equals; cheapest first."""
    sizes = [
        (float(cost), float(loss), family)
        for family, runs in families.items()
        for cost, loss in zip(*size_means(*np.array(runs, dtype=np.float64).T), strict=True)
    ]
    best: list[tuple[str, float, float]] = []
    for cost, loss, family in sorted(sizes):
        if not best or loss < best[-1][2]:
            best.append((family, cost, loss))
    return best


def _noise(cost: Floats, loss: Floats, sizes: Floats) -> tuple[Floats, float, Literal["seeds", "reference"]]:
    """Standard deviations of the means [S] of log L at `sizes`, the quantile that goes with them, their origin."""
    counts = np.array([(cost == size).sum() for size in sizes])
    freedom = int((counts - 1).sum())
    if freedom == 0:
        # Two sizes differ by 0.02 % at the 95 % bound if each deviates by 0.02 % / (2^1/2 quantile).
        quantile = float(norm.ppf(MIDDLE))
        return np.full(len(sizes), SIGNIFICANT_PERCENT / 100 / 2**0.5 / quantile), quantile, "reference"
    squares = sum(float(((logs := np.log(loss[cost == size])) - logs.mean()) @ (logs - logs.mean())) for size in sizes)
    return (squares / freedom / counts) ** 0.5, float(t.ppf(MIDDLE, freedom)), "seeds"


def _between(sizes: Floats, means: Floats, loss: float) -> float | None:
    """The cost at which straight lines between sizes first come down to a loss."""
    if means[0] <= loss:
        return float(sizes[0]) if means[0] == loss else None
    for place in range(1, len(sizes)):
        if means[place] <= loss:
            ends = np.log(means[place - 1 : place + 1])
            share = (ends[0] - np.log(loss)) / (ends[0] - ends[1])
            return float(sizes[place - 1] * (sizes[place] / sizes[place - 1]) ** share)
    return None
