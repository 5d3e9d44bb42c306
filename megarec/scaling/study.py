"""All families of a table of runs: their laws, their large ends, and what equal quality costs them."""

import math
from dataclasses import dataclass
from typing import Any

from megarec.errors import UserError
from megarec.scaling.bootstrap import REPLICATES
from megarec.scaling.compare import EqualQuality, LargeEnd, equal_quality, frontier, large_end
from megarec.scaling.fit import Fit
from megarec.scaling.law import Law, NoLaw, find_law
from megarec.scaling.points import COLUMN, Points


@dataclass(frozen=True)
class Study:
    """What can be said of a table of runs.

    Attributes:
        family: the one whose law is asked for, and whom the others are compared with.
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
    """As `tools/scaling_law.py fit --json` prints it; the asked family's figures stand at the top level too."""
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
