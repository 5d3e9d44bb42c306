import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from megarec.metrics.calibrated import Temperature, fit_histogram, fit_temperature, reliability
from megarec.metrics.weighted import losses_of, probabilities_of


def rows_of(temperature: float, n: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times too large for their labels."""
    draw = np.random.default_rng(seed)
    true = draw.normal(size=n)
    return (true * temperature).astype(np.float32), (draw.random(n) < probabilities_of(true)).astype(np.int64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_the_one_with_the_least_loss(temperature: float) -> None:
    logits, labels = rows_of(temperature)
    found = fit_temperature(logits, labels)
    best = minimize_scalar(lambda t: float(losses_of(logits / t, labels).mean()), bounds=(0.1, 10), method="bounded")
    assert found.temperature == pytest.approx(best.x, rel=1e-4)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    others, outcomes = rows_of(temperature, seed=1)
    assert found.logloss(others, outcomes) <= Temperature(1.0).logloss(others, outcomes) + 1e-4


@pytest.mark.parametrize(("labels", "expected"), [([0, 1], 1e-3), ([1, 0], 1e3), ([1, 1], 1.0)])
def test_a_temperature_stays_in_its_bounds(labels: list[int], expected: float) -> None:
    """Without an error the best would be 0, and for logits that are wrong it would be without end."""
    found = fit_temperature(np.array([-1.0, 1.0]), np.array(labels))
    assert found.temperature == pytest.approx(expected, rel=0.1) or labels == [1, 1]
    assert math.isfinite(found.logloss(np.array([-50.0, 50.0]), np.array([1, 0])))


def test_a_histogram_gives_every_bin_its_rate() -> None:
    logits, labels = rows_of(3.0)
    found = fit_histogram(logits, labels)
    assert len(found.rates) == 100 and (np.diff(found.edges) > 0).all()
    others, outcomes = rows_of(3.0, seed=1)
    p = found.rates[np.searchsorted(found.edges, others, side="right")]
    assert found.logloss(others, outcomes) == pytest.approx(log_loss(outcomes, p), abs=1e-12)
    assert found.logloss(others, outcomes) < Temperature(1.0).logloss(others, outcomes) - 0.05


@pytest.mark.parametrize("n", [1, 2, 199, 401])
def test_a_histogram_of_few_rows_of_one_label_is_certain_of_nothing(n: int) -> None:
    found = fit_histogram(np.zeros(n, np.float32), np.ones(n, np.int64))
    assert len(found.rates) == 1 and 0.5 < found.rates[0] < 1
    assert math.isfinite(found.logloss(np.array([9.0]), np.array([0])))


def test_the_curve_is_scikit_learns() -> None:
    logits, labels = rows_of(2.0, n=4000)
    p = probabilities_of(logits)
    curve = reliability(logits, labels)
    observed, predicted = calibration_curve(labels, p, n_bins=20, strategy="quantile")
    assert [own.examples for own in curve] == [200] * 20
    assert [own.predicted for own in curve] == pytest.approx(predicted, abs=0.01)
    assert [own.observed for own in curve] == pytest.approx(observed, abs=0.02)
    assert all(0 <= own.low < own.observed < own.high <= 1 for own in curve)
    assert sum(own.predicted * own.examples for own in curve) == pytest.approx(p.sum())


def test_ties_share_a_bin_and_no_rows_have_no_curve() -> None:
    assert [own.examples for own in reliability(np.zeros(50), np.ones(50))] == [50]
    assert [own.examples for own in reliability(np.repeat([1.0, 2.0], [60, 40]), np.ones(100))] == [60, 40]
    assert reliability(np.empty(0), np.empty(0)) == []
