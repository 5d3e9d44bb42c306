"""Metrics by bins against the exact ones."""

import math
from collections.abc import Callable
from dataclasses import astuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megarec.distributed.rank_pool import RankPool
from megarec.run.binned_metrics import binned_quality
from megarec.run.metrics import Predictions, Quality, quality

LARGEST_ERROR = 1e-4


def numbers(found: Quality) -> list[float]:
    """The metrics that need neither groups nor names of labels."""
    single = (found.auc, found.logloss, found.ne, found.calibration, found.prediction_mean)
    return [*single, found.examples, found.not_finite]


def binned(logits: torch.Tensor, labels: torch.Tensor, world: dist.ProcessGroup | None = None) -> Quality:
    window = Predictions()
    for part, own in zip(logits.chunk(3), labels.chunk(3), strict=True):
        window.add(part, own)
    return binned_quality(window, world)


@given(
    seed=st.integers(0, 2**31),
    center=st.sampled_from([-6.0, -4.0, 0.0, 2.0]),
    spread=st.sampled_from([1e-5, 0.01, 0.1, 1.0, 3.0]),
    tails=st.booleans(),
    rounded=st.booleans(),
)
def test_the_error_of_the_auc_is_small(seed: int, center: float, spread: float, tails: bool, rounded: bool) -> None:
    """Logits of a model whose order says something of the labels, in a narrow band and wide, with ties and outliers."""
    torch.manual_seed(seed)
    score = torch.randn(20_000)
    logits = center + spread * (score / torch.rand(20_000).clamp(min=1e-7) if tails else score)
    logits = (10 / spread * logits).round() / (10 / spread) if rounded else logits
    labels = (torch.randn(20_000) + score > 1).float()
    found, exact = binned(logits, labels), quality(logits, labels)
    assert found.auc == pytest.approx(exact.auc, abs=LARGEST_ERROR)
    assert numbers(found)[1:] == pytest.approx(numbers(exact)[1:], rel=1e-9)


def test_the_first_steps_of_a_model_that_predicts_one_number() -> None:
    """Logits within a bin are ties, as equal ones are."""
    labels = torch.tensor([0.0, 1, 1, 0, 1, 0])
    assert binned(torch.zeros(6), labels).auc == quality(torch.zeros(6), labels).auc == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_leaves_no_metric(value: float) -> None:
    logits, labels = torch.tensor([0.5, value, 0.1]), torch.tensor([1.0, 0.0, 0.0])
    found = binned(logits, labels)
    assert (found.examples, found.not_finite) == (3, 1)
    assert all(map(math.isnan, astuple(found)[:5]))


def test_one_class_and_no_examples() -> None:
    logits = torch.randn(6)
    for labels in (torch.ones(6), torch.zeros(6)):
        found, exact = binned(logits, labels), quality(logits, labels)
        assert math.isnan(found.auc) and math.isnan(found.ne)
        assert found.logloss == pytest.approx(exact.logloss)
    assert binned_quality(Predictions(), None).examples == 0


def test_largest_logits_have_a_bin() -> None:
    logits = torch.tensor([-3e38, -1.0, 1.0, 3e38])
    assert binned(logits, torch.tensor([0.0, 0.0, 1.0, 1.0])).auc == 1.0


def a_share(logits: torch.Tensor, labels: torch.Tensor) -> Quality:
    share = slice(dist.get_rank() * 50, dist.get_rank() * 50 + 50)
    return binned(logits[share], labels[share], dist.group.WORLD)


def test_all_ranks_get_the_metrics_of_all(rank_pool: Callable[[int], RankPool]) -> None:
    logits, labels = torch.randn(150), torch.randint(2, (150,)).float()
    found = rank_pool(3).run(a_share, logits, labels)
    assert found == [found[0]] * 3
    assert numbers(found[0]) == pytest.approx(numbers(quality(logits, labels)), abs=LARGEST_ERROR)
