"""Draws of rows and groups: against the same metric of rows written out as often as they were drawn."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from megarec.metrics.bootstrap import ScoredRows, compare, intervals
from megarec.metrics.grouped import group_scores
from megarec.metrics.weighted import EXAMPLE_METRICS, WeightedRows, probabilities_of

ROWS = st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=30)


@given(ROWS)
def test_a_row_that_counts_several_times_is_that_many_rows(rows: list[tuple[int, int, int]]) -> None:
    scores, labels, times = np.array(rows, np.int64).T
    logits = (scores / 2).astype(np.float32)
    found = dict(zip(EXAMPLE_METRICS, WeightedRows(logits, labels).metrics(times), strict=True))
    x, y = np.repeat(logits, times), np.repeat(labels, times)
    if not len(y):
        assert all(map(math.isnan, found.values()))
        return
    p = probabilities_of(x)
    assert found["logloss"] == pytest.approx(log_loss(y, p, labels=[0, 1]), abs=1e-12)
    if 0 < y.mean() < 1:
        assert found["auc"] == pytest.approx(roc_auc_score(y, x), abs=1e-12)
        assert found["calibration"] == pytest.approx(p.sum() / y.sum(), abs=1e-12)
        assert found["ne"] == pytest.approx(found["logloss"] / log_loss(y, np.full(len(y), y.mean())), abs=1e-12)
    else:
        assert math.isnan(found["auc"]) and math.isnan(found["ne"])


def scored(logits: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> ScoredRows:
    logits = logits.astype(np.float32)
    if groups is None:
        return ScoredRows(WeightedRows(logits, labels))
    return ScoredRows(WeightedRows(logits, labels), group_scores(logits, labels, groups, (3,)), groups)


def drawn_rows(n: int, seed: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, n)
    return labels + noise * draw.normal(size=n), labels


def test_intervals_hold_the_metric_and_narrow_with_the_rows() -> None:
    widths = []
    for n in (500, 8000):
        logits, labels = drawn_rows(n, 1)
        rows = scored(logits, labels, np.arange(n) // 10)
        found = intervals(rows, 200, seed=3)
        assert found == intervals(rows, 200, seed=3) != intervals(rows, 200, seed=4)
        assert all(found[name].low <= value <= found[name].high for name, value in rows.metrics().items())
        widths.append(found["auc"].high - found["auc"].low)
    assert 2.5 < widths[0] / widths[1] < 6.5  # 4 = sqrt(16)
    # Hanley and McNeil's standard error of an AUC A of n positives and n negatives, for 8,000 rows.
    a, n = rows.metrics()["auc"], 4000
    error = math.sqrt((a * (1 - a) + (n - 1) * (a / (2 - a) - a * a + 2 * a * a / (1 + a) - a * a)) / n**2)
    assert widths[1] == pytest.approx(2 * 1.96 * error, rel=0.25)


def test_two_runs_that_are_one_do_not_differ_and_a_worse_one_does() -> None:
    logits, labels = drawn_rows(3000, 2)
    worse = logits + np.random.default_rng(5).normal(size=3000)
    groups = np.where(np.arange(3000) < 20, -1, np.arange(3000) // 15)
    this = scored(logits, labels, groups)
    for found in compare(this, this, 99, seed=0).values():
        assert (found.difference, found.p_value, found.interval.low, found.interval.high) == (0, 1, 0, 0)
    against = compare(this, scored(worse, labels, groups), 99, seed=0)
    for name in ("auc", "gauc_by_impressions", "gauc_by_group", "ndcg@3"):
        found = against[name]
        assert found.difference == found.this - found.other > 0
        assert found.interval.low > 0 and found.p_value == 2 / 100
    assert against["logloss"].difference < 0


def test_p_values_are_even_where_nothing_differs() -> None:
    """Two models that are equally good: a p-value below 0.2 is there in a fifth of the data sets."""
    small = 0
    for seed in range(60):
        logits, labels = drawn_rows(300, 100 + seed)
        draw = np.random.default_rng(seed)
        one, other = (scored(logits + draw.normal(size=300), labels) for _ in range(2))
        small += compare(one, other, 100, seed)["auc"].p_value < 0.2
    assert 4 <= small <= 22  # 12 with a standard deviation of 3.1


def test_rows_that_go_together_are_drawn_together() -> None:
    """Ten copies of every row say no more than one: drawn by group, the interval is as wide as that of one copy."""
    logits, labels = drawn_rows(400, 6)
    worse = logits + np.random.default_rng(7).normal(size=400)
    groups = np.arange(400)

    def width(copies: int, grouped: bool) -> float:
        x, z, y, g = (np.repeat(values, copies) for values in (logits, worse, labels, groups))
        by = g if grouped else None
        found = compare(scored(x, y, by), scored(z, y, by), 200, seed=1)["auc"].interval
        return found.high - found.low

    assert width(10, True) == pytest.approx(width(1, True), rel=1e-9)
    assert width(10, False) < 0.5 * width(1, False)


def test_without_rows_or_with_one_label_there_are_no_numbers() -> None:
    assert intervals(scored(np.empty(0), np.empty(0, np.int64)), 10, seed=0) == {}
    one_label = scored(np.arange(5.0), np.ones(5, np.int64), np.zeros(5, np.int64))
    found = intervals(one_label, 10, seed=0)
    assert math.isnan(found["auc"].low) and math.isnan(found["gauc_by_group"].high) and found["logloss"].low > 0
    assert math.isnan(compare(one_label, one_label, 10, seed=0)["auc"].p_value)
