"""Ranking inside groups: GAUC, NDCG@k and HR@k by user, session or query, exact, from one sort of 64-bit numbers.

A row is one number: its group, above the place of its score in the order of float32, above its label. Sorted, a group
lies in one piece with its scores ascending, rows of one score and label are neighbours, and no permutation is kept.
From there on whole numbers are added up piece by piece, so memory beyond the numbers themselves is bounded, and the
order in which rows come, the number of ranks that scored them included, cannot change a bit of the result.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Int = NDArray[np.int64]
FIRST = 10
"""The default k of NDCG@k and HR@k."""
_SCORE_BITS = 32
_PIECE = 1 << 20  # rows that are added up at a time, or one group where it has more


@dataclass(frozen=True)
class GroupScores:
    """Figures of every group that has a row, in the order of their numbers.

    Attributes:
        groups: int64 [G], their numbers.
        examples, positives: int64 [G].
        auc: float64 [G]; NaN where all labels of the group are one.
        ndcg, hit_rate: by k, float64 [G]; NaN where the group has no positive.
    """

    groups: Int
    examples: Int
    positives: Int
    auc: Float
    ndcg: dict[int, Float]
    hit_rate: dict[int, Float]


@dataclass(frozen=True)
class Grouped:
    """Metrics over groups; NaN where no group has one.

    Attributes:
        gauc_by_impressions: mean of the groups' AUC, each with the weight of its examples.
        gauc_by_group: mean of the groups' AUC, each with the same weight ("user-mean").
        ndcg, hit_rate: by k, the mean over the groups that have a positive.
        groups: with at least one example.
        one_label: groups whose labels are all the same: they have no AUC and are left out of both GAUC.
        no_positive: groups without a positive: they are left out of NDCG and HR.
    """

    gauc_by_impressions: float
    gauc_by_group: float
    ndcg: dict[int, float]
    hit_rate: dict[int, float]
    groups: int
    one_label: int
    no_positive: int


def known(value: float) -> float | None:
    """JSON has no NaN: null."""
    return None if math.isnan(value) else value


def group_scores(
    scores: NDArray[Any], labels: NDArray[Any], groups: NDArray[Any], ks: Sequence[int] = ()
) -> GroupScores:
    """AUC, NDCG@k and HR@k of every group.

    Ties: a pair of equal scores counts half in the AUC; NDCG is averaged over the orders of equal scores, as
    scikit-learn's `ndcg_score` does; HR is the chance of a positive among the first k in such an order.

    Args:
        scores: float [N], finite; more is higher.
        labels: 0 or 1 [N].
        groups: whole numbers [N] in [0, 2^31); rows of a negative one belong to no group and do not count.
        ks: how many of a group's first rows NDCG and HR look at, each at least 1; a group with fewer has all looked at.
    """
    keys = _keys(scores, labels, groups)
    keys.sort()
    parts = [_of_piece(piece, ks) for piece in _pieces(keys)]
    if not parts:
        none, nothing = np.empty(0, np.int64), np.empty(0)
        return GroupScores(none, none, none, nothing, dict.fromkeys(ks, nothing), dict.fromkeys(ks, nothing))
    return GroupScores(
        np.concatenate([part.groups for part in parts]),
        np.concatenate([part.examples for part in parts]),
        np.concatenate([part.positives for part in parts]),
        np.concatenate([part.auc for part in parts]),
        {k: np.concatenate([part.ndcg[k] for part in parts]) for k in ks},
        {k: np.concatenate([part.hit_rate[k] for part in parts]) for k in ks},
    )


def over_groups(scores: GroupScores, times: NDArray[Any] | None = None) -> Grouped:
    """The means over groups.

    Args:
        times: how often each group counts [G], as a bootstrap draws them; None: once.
    """
    weights = np.ones(len(scores.groups)) if times is None else times.astype(np.float64)
    return Grouped(
        _mean(scores.auc, weights * scores.examples),
        _mean(scores.auc, weights),
        {k: _mean(values, weights) for k, values in scores.ndcg.items()},
        {k: _mean(values, weights) for k, values in scores.hit_rate.items()},
        len(scores.groups),
        int(np.isnan(scores.auc).sum()),
        int((scores.positives == 0).sum()),
    )


def _mean(values: Float, weights: Float) -> float:
    there = ~np.isnan(values)
    total = float(weights[there].sum())
    return float((values[there] * weights[there]).sum()) / total if total else math.nan


def _keys(scores: NDArray[Any], labels: NDArray[Any], groups: NDArray[Any]) -> NDArray[np.uint64]:
    """[rows of a group]: the numbers that are sorted."""
    assert scores.shape == labels.shape == groups.shape and scores.ndim == 1
    if len(groups) and groups.min() < 0:
        there = groups >= 0
        scores, labels, groups = scores[there], labels[there], groups[there]
    assert not len(groups) or groups.max() < 1 << 31, "group numbers need 31 bits"
    keys = groups.astype(np.uint64)
    keys <<= np.uint64(_SCORE_BITS)
    keys |= places_of(scores)
    keys <<= np.uint64(1)
    keys |= labels.astype(bool)
    return keys


def places_of(scores: NDArray[Any]) -> NDArray[np.uint32]:
    """Whole numbers in the order of the scores, equal where they are equal."""
    if scores.dtype != np.float32:
        return np.unique(scores, return_inverse=True)[1].astype(np.uint32)
    bits = (scores + np.float32(0)).view(np.uint32)  # -0 becomes 0, which it is equal to
    negative = bits >> np.uint32(31)
    return bits ^ ((np.uint32(0) - negative) | np.uint32(1 << 31))


def _pieces(keys: NDArray[np.uint64]) -> Iterator[NDArray[np.uint64]]:
    """Parts of sorted numbers that hold whole groups."""
    start, shift = 0, _SCORE_BITS + 1
    while start < len(keys):
        stop = start + _PIECE
        if stop < len(keys):
            group = int(keys[stop]) >> shift
            stop = int(np.searchsorted(keys, np.uint64(group << shift)))
            if stop <= start:  # one group has more
                stop = int(np.searchsorted(keys, np.uint64((group + 1) << shift)))
        yield keys[start:stop]
        start = stop


def _starts(values: NDArray[np.uint64]) -> Int:
    """Where runs of equal values begin."""
    return np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))


def _lengths(starts: Int, total: int) -> Int:
    return np.diff(starts, append=total)


def _of_piece(keys: NDArray[np.uint64], ks: Sequence[int]) -> GroupScores:
    labels = (keys & np.uint64(1)).astype(np.int64)
    levels = keys >> np.uint64(1)  # rows of one group and score
    level_starts = _starts(levels)
    of_level = levels[level_starts] >> np.uint64(_SCORE_BITS)
    first_level = _starts(of_level)  # of each group
    group_starts = level_starts[first_level]
    examples = _lengths(group_starts, len(keys))
    positives = np.add.reduceat(labels, group_starts)
    negatives = examples - positives

    rows, hits = _lengths(level_starts, len(keys)), np.add.reduceat(labels, level_starts)
    misses = rows - hits
    per_group = _lengths(first_level, len(level_starts))
    below = np.cumsum(misses) - misses  # in the piece, then in the group
    below -= np.repeat(below[first_level], per_group)
    pairs_twice = np.add.reduceat(hits * (2 * below + misses), first_level)
    both = (positives > 0) & (negatives > 0)
    auc = np.full(len(examples), math.nan)
    np.divide(pairs_twice, 2 * positives * negatives, out=auc, where=both)

    found = GroupScores(of_level[first_level].astype(np.int64), examples, positives, auc, {}, {})
    if ks:
        ends = np.repeat(group_starts + examples, per_group)
        before = ends - (level_starts + rows)  # rows of the group with a higher score
        for k in ks:
            ndcg, hit = _first(k, before, rows, hits, first_level, positives)
            found.ndcg[k], found.hit_rate[k] = ndcg, hit
    return found


def _first(k: int, before: Int, rows: Int, hits: Int, first_level: Int, positives: Int) -> tuple[Float, Float]:
    """NDCG@k and HR@k by group.

    Args:
        before, rows, hits: of each level of a score: rows above it, its rows, its positives.
        first_level: of each group.
    """
    assert k >= 1
    gained = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(k) + 2))])  # discounts of the first 0 .. k places
    places = gained[np.minimum(before + rows, k)] - gained[np.minimum(before, k)]
    dcg = np.add.reduceat(hits / rows * places, first_level)
    ndcg = np.full(len(positives), math.nan)
    np.divide(dcg, gained[np.minimum(positives, k)], out=ndcg, where=positives > 0)

    sure = np.add.reduceat(np.where(before + rows <= k, hits, 0), first_level) > 0
    cut = (before < k) & (before + rows > k)  # the level that is only partly looked at, at most one a group
    missed = np.ones(len(rows))
    seen, tied, wrong = (k - before)[cut], rows[cut], (rows - hits)[cut]
    chance = np.ones(len(tied))
    for drawn in range(int(seen.max(initial=0))):
        chance *= np.where(drawn < seen, np.maximum(wrong - drawn, 0) / np.maximum(tied - drawn, 1), 1.0)
    missed[cut] = chance
    hit = 1 - np.multiply.reduceat(missed, first_level)
    hit[sure] = 1.0
    hit[positives == 0] = math.nan
    return ndcg, hit
