import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from megarec.distributed.rank_pool import RankPool
from megarec.run.metrics import Predictions, Quality, described, in_words, points, quality, why_undefined


def plain_auc(scores: list[float], labels: list[int]) -> float:
    """Chance that a positive outranks a negative, ties counting half: every pair, one by one."""
    pairs = [
        (p, n) for p, y in zip(scores, labels, strict=True) if y for n, z in zip(scores, labels, strict=True) if not z
    ]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


@given(st.lists(st.tuples(st.integers(-40, 40), st.integers(0, 1)), min_size=1, max_size=30))
def test_against_the_definitions(rows: list[tuple[int, int]]) -> None:
    scores, labels = [score / 2 for score, _ in rows], [label for _, label in rows]
    found = quality(torch.tensor(scores), torch.tensor(labels))
    p = [1 / (1 + math.exp(-score)) for score in scores]
    # log(1 - p) written so that it does not cancel for large scores
    losses = [math.log1p(math.exp(-s)) if y else math.log1p(math.exp(s)) for s, y in zip(scores, labels, strict=True)]
    assert found.examples == len(rows)
    assert found.logloss == pytest.approx(sum(losses) / len(losses))
    rate = sum(labels) / len(labels)
    if 0 < rate < 1:
        assert found.auc == pytest.approx(plain_auc(scores, labels))
        entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
        assert found.ne == pytest.approx(found.logloss / entropy)
        assert found.calibration == pytest.approx(sum(p) / sum(labels))
    else:
        assert math.isnan(found.auc) and math.isnan(found.ne)


def test_logits_that_a_float32_sigmoid_would_tie_keep_their_order() -> None:
    assert quality(torch.tensor([30.0, 40.0]), torch.tensor([0.0, 1.0])).auc == 1.0


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("every", [1, 7])
def test_a_logit_that_is_not_finite_leaves_no_metric(wrong: float, every: int) -> None:
    """Six NaN had an AUC of 1, and one infinity a LogLoss of NaN beside a finite AUC."""
    logits, labels = torch.randn(7), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    logits[::every] = wrong
    found = quality(logits, labels)
    assert [math.isnan(value) for value in (found.auc, found.logloss, found.ne, found.calibration)] == [True] * 4
    assert (found.examples, found.not_finite) == (7, len(logits[::every]))
    assert described(found)["auc"] is None and f"{found.not_finite} of 7 logits are NaN or infinite" in in_words(found)
    assert why_undefined(found, "auc") == f"{found.not_finite} of 7 logits are NaN or infinite"


def test_one_class_has_a_logloss_and_no_auc() -> None:
    found = quality(torch.randn(5), torch.ones(5))
    assert why_undefined(found, "logloss") is None
    assert why_undefined(found, "auc") == "all 5 examples have one label, so there is no AUC"


def test_padding_does_not_count() -> None:
    predictions = Predictions()
    predictions.add(torch.tensor([1.0, -1.0, 9.0]), torch.tensor([1.0, 0.0, 0.0]), valid=2)
    found = predictions.gather(None)
    assert (found.examples, found.auc) == (2, 1.0)
    assert predictions.gather(None).examples == 0


def a_share(logits: torch.Tensor, labels: torch.Tensor) -> Quality:
    predictions = Predictions()
    share = slice(dist.get_rank() * 50, dist.get_rank() * 50 + 50)
    predictions.add(logits[share], labels[share], valid=49)
    assert dist.group.WORLD is not None
    return predictions.gather(dist.group.WORLD)


def test_every_rank_gets_the_metrics_of_all(rank_pool: Callable[[int], RankPool]) -> None:
    logits, labels = torch.randn(150), torch.randint(2, (150,)).float()
    counted = torch.arange(150) % 50 != 49
    expected = quality(logits[counted], labels[counted])
    assert rank_pool(3).run(a_share, logits, labels) == [expected] * 3
    assert expected.examples == 147


def shared_out(logits: torch.Tensor, labels: torch.Tensor, groups: list[int], names: tuple[str, ...] = ()) -> Quality:
    """Batches of the split as an EvalLoader has them: padded, each rank its part; the last label is the main."""
    ranks, rank, share = dist.get_world_size(), dist.get_rank(), 7
    predictions = Predictions(names, names[-1] if names else None)
    for start in range(0, len(logits), ranks * share):
        rows = torch.arange(start + rank * share, start + (rank + 1) * share)
        rows, valid = rows.clamp(max=len(logits) - 1), int((rows < len(logits)).sum())
        predictions.add(logits[rows], labels[rows], valid)
    return predictions.gather(dist.group.WORLD, np.array(groups) if rank == 0 else None)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_gauc_is_scikit_learns_on_any_number_of_ranks(rank_pool: Callable[[int], RankPool], ranks: int) -> None:
    draw = np.random.default_rng(0)
    groups = draw.integers(-1, 30, 400)
    labels, logits = draw.integers(0, 2, 400), draw.normal(size=400).astype(np.float32).round(1)
    labels[groups == 3] = 1
    of_group = {g: groups == g for g in range(30) if g != 3}
    aucs = {g: roc_auc_score(labels[rows], logits[rows]) for g, rows in of_group.items()}
    by_impressions = sum(of_group[g].sum() * auc for g, auc in aucs.items()) / sum(r.sum() for r in of_group.values())
    results = rank_pool(ranks).run(shared_out, torch.tensor(logits), torch.tensor(labels).float(), groups.tolist())
    assert results == [results[0]] * ranks and (results[0].examples, results[0].auc) == (
        400,
        roc_auc_score(labels, logits),
    )
    gauc = results[0].gauc
    assert gauc is not None and (gauc.groups, gauc.one_label) == (30, 1)
    assert gauc.by_impressions == pytest.approx(by_impressions, abs=1e-12)
    assert gauc.by_group == pytest.approx(sum(aucs.values()) / 29, abs=1e-12)
    assert f"GAUC {by_impressions:.4f} by impressions" in in_words(results[0])
    assert described(results[0])["gauc"]["groups"] == 30 and points(results[0])["gauc_by_group"] == gauc.by_group
    assert "gauc" not in described(quality(torch.tensor(logits), torch.tensor(labels)))


def ranked(scores: NDArray[Any], labels: NDArray[Any], groups: NDArray[Any]) -> list[float]:
    """GAUC by impressions and by group, NDCG@10, HR@10 by their words: pair by pair, row by row; without ties."""
    aucs, weights, gains, hits = [], [], [], []
    for group in set(groups[groups >= 0].tolist()):
        own = sorted(zip(scores[groups == group], labels[groups == group], strict=True), reverse=True)
        order = [int(label) for _, label in own]
        if 0 < sum(order) < len(order):
            aucs.append(plain_auc([float(score) for score, _ in own], order))
            weights.append(len(order))
        if sum(order):
            best = sum(1 / math.log2(place + 2) for place in range(min(10, sum(order))))
            gains.append(sum(label / math.log2(place + 2) for place, label in enumerate(order[:10])) / best)
            hits.append(float(any(order[:10])))
    weighted = sum(w * auc for w, auc in zip(weights, aucs, strict=True)) / sum(weights)
    return [weighted, *(sum(values) / len(values) for values in (aucs, gains, hits))]


def test_each_label_has_its_metrics_by_group_over_the_rows_that_have_it(rank_pool: Callable[[int], RankPool]) -> None:
    draw = np.random.default_rng(1)
    groups = draw.integers(-1, 12, 500)
    logits = draw.normal(size=(500, 2)).astype(np.float32)
    labels = (draw.random((500, 2)) < [0.3, 0.05]).astype(np.float32)
    labels[draw.random(500) < 0.3, 1] = np.nan
    labels[(groups == 3), 1] = np.nan  # a group whose rows all lack the second label
    names = ("click", "buy")
    results = rank_pool(3).run(shared_out, torch.tensor(logits), torch.tensor(labels), groups.tolist(), names)
    assert results == [results[0]] * 3
    for number, (name, own) in enumerate(results[0].labels.items()):
        there = ~np.isnan(labels[:, number])
        expected = ranked(logits[there, number], labels[there, number], groups[there])
        assert own.gauc is not None and own.gauc.groups == (12 if name == "click" else 11)
        found = [own.gauc.by_impressions, own.gauc.by_group, own.ndcg[10], own.hit_rate[10]]
        assert found == pytest.approx(expected, abs=1e-12), name
        drawn = points(results[0])
        metrics = ("gauc_by_impressions", "gauc_by_group", "ndcg_at_10", "hit_rate_at_10")
        assert [drawn[f"labels/{name}/{metric}"] for metric in metrics] == found
        assert described(results[0])["labels"][name]["hit_rate"] == {"10": own.hit_rate[10]}
    assert (results[0].gauc, results[0].ndcg) == (results[0].labels["buy"].gauc, results[0].labels["buy"].ndcg)


def test_a_logit_that_is_not_finite_leaves_no_gauc_either() -> None:
    predictions = Predictions()
    predictions.add(torch.tensor([1.0, math.nan, 0.0, 2.0]), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    gauc = predictions.gather(None, np.array([0, 0, 1, 1])).gauc
    assert gauc is not None and math.isnan(gauc.by_impressions) and (gauc.groups, gauc.one_label) == (2, 0)
