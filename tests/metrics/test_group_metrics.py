"""Metrics by group, against scikit-learn and against what the words say, row by row."""

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import ndcg_score, roc_auc_score

from megarec.metrics import grouped
from megarec.metrics.grouped import GroupScores, group_scores, known, over_groups

KS = (1, 3, 10)


def close(found: float, expected: float) -> bool:
    return (math.isnan(found) and math.isnan(expected)) or abs(found - expected) <= 1e-12


def chance_of_a_hit(scores: NDArray[np.float32], labels: NDArray[np.int64], k: int) -> float:
    """Over every order in which the scores do not rise."""
    best = -np.sort(-scores)
    orders = [order for order in itertools.permutations(range(len(scores))) if (scores[list(order)] == best).all()]
    return sum(any(labels[row] for row in order[:k]) for order in orders) / len(orders)


def check(
    found: GroupScores, scores: NDArray[np.float32], labels: NDArray[np.int64], groups: NDArray[np.int64]
) -> None:
    there = np.unique(groups[groups >= 0])
    assert found.groups.tolist() == there.tolist()
    for place, group in enumerate(there):
        x, y = scores[groups == group], labels[groups == group]
        assert (found.examples[place], found.positives[place]) == (len(y), y.sum())
        one_label = len(set(y.tolist())) == 1
        assert close(found.auc[place], math.nan if one_label else float(roc_auc_score(y, x)))
        for k in found.ndcg:
            expected = math.nan
            if y.any():
                expected = float(ndcg_score(y[None], x[None], k=k)) if len(y) > 1 else 1.0
            assert close(found.ndcg[k][place], expected), (k, x, y)


ROWS = st.lists(st.tuples(st.integers(-1, 4), st.integers(-3, 3), st.integers(0, 1)), max_size=40)


@given(ROWS, st.integers(1, 50))
def test_every_group_is_as_scikit_learn_has_it(rows: list[tuple[int, int, int]], piece: int) -> None:
    """Ties, groups of one row and of one label, rows without a group; cut into pieces of any size."""
    groups, scores, labels = np.array(rows, np.int64).reshape(-1, 3).T
    scores = (scores / 3).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "_PIECE", piece)
        check(group_scores(scores, labels, groups, KS), scores, labels, groups)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=6), st.integers(1, 7))
def test_a_hit_is_the_chance_over_the_orders_of_ties(rows: list[tuple[int, int]], k: int) -> None:
    scores, labels = np.array(rows, np.int64).T
    found = group_scores(scores.astype(np.float32), labels, np.zeros(len(rows), np.int64), [k])
    expected = chance_of_a_hit(scores, labels, k) if labels.any() else math.nan
    assert close(found.hit_rate[k][0], expected)


def test_the_means_are_those_of_the_words_and_leave_out_what_is_undefined() -> None:
    groups = np.array([7, 7, 7, 7, 3, 3, 5, 5, 9])
    labels = np.array([1, 0, 0, 0, 1, 0, 1, 1, 0])
    scores = np.array([3, 4, 2, 1, 2, 1, 0, 1, 5], np.float32)  # AUC of 7: 2/3, of 3: 1; 5 and 9 have one label
    found = over_groups(group_scores(scores, labels, groups, [2]))
    assert found.gauc_by_impressions == pytest.approx((4 * 2 / 3 + 2 * 1) / 6, abs=1e-15)
    assert found.gauc_by_group == pytest.approx((2 / 3 + 1) / 2, abs=1e-15)
    assert (found.groups, found.one_label, found.no_positive) == (4, 2, 1)
    assert found.ndcg[2] == pytest.approx((1 / math.log2(3) + 1 + 1) / 3, abs=1e-15)
    assert found.hit_rate[2] == 1.0
    twice = over_groups(group_scores(scores, labels, groups), np.array([1, 2, 3, 4]))  # groups 3, 5, 7, 9
    assert twice.gauc_by_group == pytest.approx((1 * 1 + 3 * 2 / 3) / 4, abs=1e-15)
    assert twice.gauc_by_impressions == pytest.approx((1 * 2 * 1 + 3 * 4 * 2 / 3) / 14, abs=1e-15)


@pytest.mark.parametrize("groups", [[], [-1, -1], [4, 4]])
def test_without_a_group_that_counts_there_is_no_number_and_no_warning(groups: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = over_groups(
            group_scores(np.ones(len(groups), np.float32), np.zeros(len(groups)), np.array(groups), [5])
        )
    values = [found.gauc_by_impressions, found.gauc_by_group, found.ndcg[5], found.hit_rate[5]]
    assert list(map(known, values)) == [None] * 4


def test_the_order_of_rows_does_not_change_a_bit() -> None:
    draw = np.random.default_rng(0)
    groups, labels = draw.integers(0, 50, 3000), draw.integers(0, 2, 3000)
    scores = draw.normal(size=3000).astype(np.float32).round(1)
    order = draw.permutation(3000)
    one, other = (
        over_groups(group_scores(scores[rows], labels[rows], groups[rows], KS)) for rows in (np.arange(3000), order)
    )
    assert one == other
    doubles = group_scores(scores.astype(np.float64), labels, groups, KS)
    assert over_groups(doubles) == one
    check(doubles, scores, labels, groups)


def test_scores_keep_the_order_of_floats_at_every_size() -> None:
    scores = np.array([-3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38], np.float32)
    labels = np.array([0, 0, 0, 1, 0, 1, 1, 1])
    found = group_scores(scores, labels, np.zeros(8, np.int64))
    assert found.auc[0] == roc_auc_score(labels, scores) == 15.5 / 16
