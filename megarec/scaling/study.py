"""All families of a table of runs: their laws, their large ends, and what equal quality costs them.

Does a family still improve at its large end?
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.stats import norm, t

from megarec.errors import UserError
from megarec.scaling.fit import Fit, Floats
from megarec.scaling.law import MIDDLE, REPLICATES, SIGNIFICANT_PERCENT, STEP, Law, NoLaw, find_law, size_means
from megarec.scaling.points import COLUMN, Points, Run

END_SIZES = 3
SIGNIFICANT_SLOPE = float(np.log1p(-SIGNIFICANT_PERCENT / 100) / np.log(STEP))  # d ln L / d ln C


class LargeEnd(NamedTuple):
    """How a family's loss moves over its last three sizes (two, if there are no more).

    Attributes:
        slope: d ln L / d ln C by least squares over these sizes, the local exponent.
        interval: 95 %, by the runs' deviations where sizes have several ("seeds"), else ("reference") with
            differences between two sizes of up to 0.02 % counted as noise.
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
        """The other family's cost over the reference's by its law; None where that is undefined."""
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


@dataclass(frozen=True)
class Study:
    """The findings from a table of runs.

    Attributes:
        family: the reference, which the others are compared with.
        laws, ends: by family, the same families as `points.families`.
        comparisons: of every other family with `family`.
        frontier: family, cost and mean loss of the sizes that none at their cost or less equals.
    """

    points: Points
    family: str
    laws: dict[str, Law | NoLaw]
    ends: dict[str, LargeEnd | None]
    comparisons: tuple[EqualQuality, ...]
    frontier: tuple[tuple[str, float, float], ...]


def study(points: Points, family: str | None = None, replicates: int = REPLICATES) -> Study:
    """Fit and compare.

    Args:
        family: whose law is asked for; None: that of the most sizes.
        replicates: refits a bootstrap.

    Raises:
        UserError: there is no such family.
    """
    families = points.families
    if family is None:
        family = max(families, key=lambda name: len({run.cost for run in families[name]}))
    if family not in families:
        raise UserError(f"{points.source}: no measured family {family}; there are {', '.join(families)}")
    laws = {name: find_law(runs, points.axis, replicates) for name, runs in families.items()}
    return Study(
        points,
        family,
        laws,
        {name: large_end(runs) for name, runs in families.items()},
        tuple(
            equal_quality(name, runs, families[family], laws[family])
            for name, runs in families.items()
            if name != family
        ),
        tuple(frontier(families)),
    )


def as_json(result: Study) -> dict[str, Any]:
    """As `tools/scaling_law.py fit --json` prints it; the reference family's figures are at the top level too."""
    cost = COLUMN[result.points.axis]
    families = {name: _family(result, name) for name in result.points.families}
    return {
        "source": result.points.source,
        "against": cost,
        "quality": result.points.quality,
        "family": result.family,
        **families[result.family],
        "families": families,
        "equal_quality": [_equal(comparison, cost) for comparison in result.comparisons],
        "frontier": [{"family": name, cost: at, "loss": loss} for name, at, loss in result.frontier],
    }


def _family(result: Study, name: str) -> dict[str, Any]:
    law, end = result.laws[name], result.ends[name]
    common = {
        "points": len(result.points.families[name]),
        "sizes": law.sizes,
        "unmeasured": result.points.unmeasured.get(name, ()),
        "large_end": end and {**end._asdict(), "verdict": end.verdict},
    }
    if isinstance(law, NoLaw):
        empty = dict.fromkeys(("exponent", "exponent_interval", "extrapolation_error"))
        return {"law": False, "reason": law.reason, **empty, **common}
    return {
        "law": True,
        "reason": None,
        "exponent": law.curve.exponent,
        "exponent_interval": law.exponent_interval,
        "extrapolation_error": law.extrapolation_error,
        **common,
        "form": law.form,
        "forms": {form: _fit(fit) for form, fit in law.fits.items()},
        "forms_differ": law.forms_differ,
        "percent_per_4x": law.per_step,
        "percent_per_4x_interval": law.per_step_interval,
        "bootstrap": {"resampled": law.bootstrap.resampled, "replicates": len(law.bootstrap.curves)},
        "held_out": [held._asdict() for held in law.held_out],
    }


def _fit(fit: Fit) -> dict[str, Any]:
    return {
        "exponent": fit.curve.exponent,
        "coefficient": fit.curve.coefficient,
        "constant": fit.curve.constant,
        "aicc": fit.aicc,
        "scatter": fit.scatter,
    }


def _equal(comparison: EqualQuality, cost: str) -> dict[str, Any]:
    low, high = comparison.by_law_interval or (None, None)
    return {
        "family": comparison.family,
        cost: comparison.cost,
        "loss": comparison.loss,
        "needed_between_points": comparison.between,
        "needed_by_law": _finite(comparison.by_law),
        "needed_by_law_interval": [_finite(low), _finite(high)],
        "extrapolated": comparison.extrapolated,
        "times_between_points": comparison.between and comparison.cost / comparison.between,
        "times_by_law": comparison.times_by_law,
    }


def _finite(value: float | None) -> float | None:
    """JSON knows no infinity: a quality that is never reached is null."""
    return value if value is not None and math.isfinite(value) else None
