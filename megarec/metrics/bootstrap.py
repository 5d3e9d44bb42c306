"""Intervals of a metric, and whether one run is better than another: the seeded bootstrap.

Metrics of examples are drawn by example, metrics of groups by group, with replacement. Two runs are compared on the
same draws of the same rows. Where the rows have groups, all metrics of a comparison are drawn by group: rows of one
user go together, and a test that treats them as independent finds false differences. So one method serves
AUC, LogLoss and GAUC; DeLong's would only serve the AUC, and only of independent rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megarec.metrics.grouped import GroupScores, over_groups
from megarec.metrics.weighted import EXAMPLE_METRICS, Float, WeightedRows

LEVEL = 0.95
"""Of every interval: from the 2.5th to the 97.5th percentile of the draws."""


@dataclass(frozen=True)
class Interval:
    """Percentiles of a metric's draws; NaN where no draw has the metric."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Of a metric between two runs on the same rows.

    Attributes:
        this, other: the metric of either.
        difference: this - other, with its interval.
        p_value: two-sided: how often a draw has the other sign, or none, twice; (count + 1) / (draws + 1), so that it
            is never 0. NaN where the metric is not defined.
    """

    this: float
    other: float
    difference: float
    interval: Interval
    p_value: float


@dataclass(frozen=True)
class ScoredRows:
    """One model's scores of N rows.

    Attributes:
        rows: their logits and labels.
        scores: of their groups; None: they have none.
        groups: whole numbers [N], as `scores` was made from; None likewise.
    """

    rows: WeightedRows
    scores: GroupScores | None = None
    groups: NDArray[Any] | None = None

    def of_groups(self, times: NDArray[Any] | None = None) -> dict[str, float]:
        """Metrics of groups, by name, each group counted that often."""
        assert self.scores is not None
        found = over_groups(self.scores, times)
        named = {"gauc_by_impressions": found.gauc_by_impressions, "gauc_by_group": found.gauc_by_group}
        named |= {f"ndcg@{k}": value for k, value in found.ndcg.items()}
        return named | {f"hit_rate@{k}": value for k, value in found.hit_rate.items()}

    def of_examples(self, times: NDArray[Any] | None = None) -> dict[str, float]:
        return dict(zip(EXAMPLE_METRICS, self.rows.metrics(times).tolist(), strict=True))

    def metrics(self) -> dict[str, float]:
        """All of them, by name."""
        return self.of_examples() | (self.of_groups() if self.scores is not None else {})


def _times(n: int, draws: int, seed: int, purpose: int) -> Iterator[NDArray[np.int64]]:
    """How often each of n counts, draw by draw."""
    generator = np.random.default_rng([seed, purpose])
    for _ in range(draws):
        yield np.bincount(generator.integers(0, n, n), minlength=n)


def _percentiles(values: Float) -> Interval:
    there = values[~np.isnan(values)]
    if not len(there):
        return Interval(math.nan, math.nan)
    low, high = np.quantile(there, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def intervals(scored: ScoredRows, draws: int, seed: int) -> dict[str, Interval]:
    """The 95 % interval of every metric, by name: of examples by example, of groups by group; none without draws."""
    found: dict[str, list[float]] = {}

    def note(values: dict[str, float]) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)

    if len(scored.rows):
        for times in _times(len(scored.rows), draws, seed, 0):
            note(scored.of_examples(times))
    if scored.scores is not None and len(scored.scores.groups):
        for times in _times(len(scored.scores.groups), draws, seed, 1):
            note(scored.of_groups(times))
    return {name: _percentiles(np.array(values)) for name, values in found.items()}


def compare(this: ScoredRows, other: ScoredRows, draws: int, seed: int) -> dict[str, Difference]:
    """Every metric of two models on the same rows, in the same order.

    Args:
        draws: at least 1; p-values are no finer than 2 / (draws + 1).
    """
    assert len(this.rows) == len(other.rows) and draws >= 1
    at = {name: (value, other.metrics()[name]) for name, value in this.metrics().items()}
    drawn: dict[str, list[float]] = {name: [] for name in at}
    for rows, groups in _paired_times(this, draws, seed):
        first, second = (
            scored.of_examples(rows) | (scored.of_groups(groups) if groups is not None else {})
            for scored in (this, other)
        )
        for name in drawn:
            drawn[name].append(first[name] - second[name])
    return {
        name: Difference(
            mine, theirs, mine - theirs, _percentiles(np.array(drawn[name])), _p_value(np.array(drawn[name]))
        )
        for name, (mine, theirs) in at.items()
    }


def _paired_times(scored: ScoredRows, draws: int, seed: int) -> Iterator[tuple[NDArray[Any], NDArray[Any] | None]]:
    """How often each row, and each group, counts; a row without a group is drawn on its own."""
    if scored.scores is None or scored.groups is None:
        for times in _times(len(scored.rows), draws, seed, 0):
            yield times, None
        return
    known = len(scored.scores.groups)
    unit = np.searchsorted(scored.scores.groups, scored.groups)
    alone = np.flatnonzero(scored.groups < 0)
    unit[alone] = known + np.arange(len(alone))
    for times in _times(known + len(alone), draws, seed, 1):
        yield times[unit], times[:known]


def _p_value(differences: Float) -> float:
    there = differences[~np.isnan(differences)]
    if not len(there):
        return math.nan
    least = min(int((there <= 0).sum()), int((there >= 0).sum()))
    return min(1.0, 2 * (least + 1) / (len(there) + 1))
