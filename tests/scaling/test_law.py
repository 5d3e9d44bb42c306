"""The law: known ones are found again, the published one too, and too little is refused."""

import math

import numpy as np
import pytest

from megarec.scaling.fit import Curve, chosen, fit_forms
from megarec.scaling.ladder import LADDER
from megarec.scaling.law import Law, NoLaw, find_law, resample, size_means
from megarec.scaling.points import Run, read_points

SIZES = np.geomspace(0.5, 100, 7)
REPLICATES = 60


def runs_of(losses: np.ndarray, noise: float, seeds: int = 1, sizes: np.ndarray = SIZES) -> tuple[Run, ...]:
    draws = np.random.default_rng(3)
    return tuple(
        Run(float(size), float(loss * np.exp(noise * draws.standard_normal())))
        for size, loss in zip(sizes, losses, strict=True)
        for _ in range(seeds)
    )


def test_exact_points_give_the_exact_law_of_either_form() -> None:
    for curve in (
        Curve("power", -0.05, math.log(0.4), 0.0, 1.0),
        Curve("power+constant", -0.4, math.log(0.2), 0.45, 1.0),
    ):
        fits = fit_forms(SIZES, curve(SIZES))
        assert chosen(fits) == curve.form
        found = fits[curve.form].curve
        assert found.exponent == pytest.approx(curve.exponent, rel=1e-4)
        assert found.coefficient == pytest.approx(math.exp(curve.log_scale), rel=1e-4)
        assert found.constant == pytest.approx(curve.constant, rel=1e-4)
        assert found.cost_of(float(curve(np.array(9.0)))) == pytest.approx(9.0, rel=1e-3)


def test_noisy_power_law_lies_in_the_interval() -> None:
    law = find_law(runs_of(0.5 * SIZES**-0.01, noise=5e-4), replicates=REPLICATES)
    assert isinstance(law, Law)
    assert (law.form, law.bootstrap.resampled) == ("power", "residuals")
    low, high = law.exponent_interval
    assert low < -0.01 < high
    assert high - low < 0.002
    assert law.per_step == pytest.approx(100 * (4**law.curve.exponent - 1))


def test_noisy_law_with_a_constant_loss_lies_in_the_interval() -> None:
    law = find_law(runs_of(0.1 * SIZES**-0.3 + 0.45, noise=5e-4, seeds=3), replicates=REPLICATES)
    assert isinstance(law, Law)
    assert (law.form, law.runs, law.sizes, law.forms_differ) == ("power+constant", 21, 7, True)
    low, high = law.exponent_interval
    assert low < -0.3 < high
    assert high - low < 0.15
    assert law.curve.constant == pytest.approx(0.45, abs=0.005)
    assert law.held_out[0].form == "power+constant" and abs(law.held_out[0].percents[0]) < 0.5


def test_a_run_that_went_wrong_bends_no_curve() -> None:
    runs = list(runs_of(0.5 * SIZES**-0.01, noise=2e-4))
    runs[5] = Run(runs[5].cost, runs[5].loss * 1.05)
    cost, loss = np.array(runs).T
    plain = np.polyfit(np.log(cost), np.log(loss), 1)[0]
    robust = fit_forms(cost, loss)["power"].curve.exponent
    assert abs(robust + 0.01) < 0.1 * abs(plain + 0.01)


def test_published_ladder() -> None:
    """arXiv 2403.02545: y = -100 + 99.56 x^-0.00071, about 0.1 % for each 4x."""
    law = find_law(read_points(LADDER).families["wukong"], replicates=150)
    assert isinstance(law, Law)
    assert (law.form, law.sizes) == ("power", 7)
    assert law.curve.exponent == pytest.approx(-0.00071, rel=0.05)
    assert law.curve.coefficient == pytest.approx(0.9956, abs=2e-4)
    assert law.per_step == pytest.approx(-0.1, abs=0.01)
    low, high = law.exponent_interval
    assert low < -0.00071 < high < 0
    assert [held.costs for held in law.held_out] == [(108.0,), (61.0, 108.0)]
    assert abs(law.held_out[0].percents[0]) < 0.03
    assert law.extrapolation_error == max(abs(percent) for held in law.held_out for percent in held.percents)


def test_held_out_error_is_that_of_a_fit_without_them() -> None:
    losses = 0.5 * SIZES**-0.02
    losses[-1] *= 1.03  # the last size flattens
    law = find_law(runs_of(losses, noise=0), replicates=REPLICATES)
    assert isinstance(law, Law)
    assert law.held_out[0].percents[0] == pytest.approx(100 * (1 / 1.03 - 1), rel=1e-3)
    assert law.held_out[1].percents[0] == pytest.approx(0, abs=1e-3)


def test_what_is_held_out_does_not_choose_the_form() -> None:
    law = find_law(runs_of(0.1 * SIZES**-0.3 + 0.45, noise=0), replicates=REPLICATES)
    assert isinstance(law, Law) and law.form == "power+constant"
    assert [held.form for held in law.held_out] == ["power+constant", "power"]  # too few sizes to choose a form
    assert abs(law.held_out[0].percents[0]) < 1e-3 < abs(law.held_out[1].percents[-1])


def test_a_loss_that_levels_off_is_no_law() -> None:
    for losses in (
        [0.47, 0.46, 0.4601, 0.4599, 0.4601, 0.4602, 0.4603],
        [0.47, 0.46, 0.4601, 0.4599, 0.4601, 0.46],
    ):
        sizes = np.geomspace(1, 100, len(losses))
        law = find_law(tuple(map(Run, sizes, losses)), replicates=REPLICATES)
        assert isinstance(law, NoLaw)
        assert law.reason.startswith("it levels off at 0.46")


def test_too_few_sizes_are_no_law() -> None:
    three = runs_of(0.5 * SIZES[:3] ** -0.01, 0, seeds=5, sizes=np.array([1.0, 10.0, 100.0]))
    assert find_law(three) == NoLaw(3, "3 sizes measured, a law needs 4")


def test_less_than_a_decade_is_no_law() -> None:
    sizes = np.geomspace(1, 9, 8)
    law = find_law(runs_of(0.5 * sizes**-0.1, 0, sizes=sizes))
    assert law == NoLaw(8, "less than a decade of compute (1 to 9 GFLOP/example, 9x), a law needs 10x")
    assert "decade of parameters" in getattr(
        find_law(runs_of(0.5 * sizes**-0.1, 0, sizes=sizes), "parameters"), "reason", ""
    )


def test_a_loss_that_does_not_fall_is_no_law() -> None:
    for losses in (np.full(7, 0.5), 0.5 * SIZES**0.01):
        law = find_law(runs_of(losses, noise=1e-3), replicates=REPLICATES)
        assert isinstance(law, NoLaw)
        assert "does not lie below 0" in law.reason


def test_scatter_between_sizes_widens_the_interval_of_seeds_alone() -> None:
    """Seeds agree, sizes do not lie on the curve: an interval from the seeds alone would be far too narrow."""
    wobble = np.exp(1e-3 * np.array([1, -1, 1, -1, 1, -1, 1]))
    cost, loss = np.array(runs_of(0.5 * SIZES**-0.01 * wobble, noise=1e-5, seeds=3)).T
    bootstrap = resample(cost, loss, fit_forms(*size_means(cost, loss))["power"], REPLICATES)
    low, high = bootstrap.exponent()
    assert bootstrap.resampled == "residuals"
    assert high - low > 5e-4
    assert find_law(runs_of(0.5 * SIZES**-0.01 * wobble, 1e-5, seeds=3), replicates=2).form == "power"


def test_seeds_count_where_sizes_lie_on_the_curve_better_than_seeds_agree() -> None:
    """Losses come in pairs about the curve, so that every mean lies on it."""
    pair = np.exp([1e-3, -1e-3])
    cost, loss = np.repeat(SIZES, 2), np.outer(0.5 * SIZES**-0.01, pair).ravel()
    bootstrap = resample(cost, loss, fit_forms(*size_means(cost, loss))["power"], REPLICATES)
    low, high = bootstrap.exponent()
    assert bootstrap.resampled == "seeds"
    assert low < -0.01 < high


def test_interval_is_about_as_wide_as_ordinary_least_squares_says() -> None:
    from scipy.stats import linregress, t

    cost, loss = np.array(runs_of(0.5 * SIZES**-0.01, noise=5e-4)).T
    line = linregress(np.log(cost), np.log(loss))
    low, high = resample(cost, loss, fit_forms(cost, loss)["power"], 200).exponent()
    assert high - low == pytest.approx(2 * t.ppf(0.975, len(cost) - 2) * line.stderr, rel=0.35)


def test_means_of_a_size_are_geometric() -> None:
    sizes, means = size_means(np.array([2.0, 1.0, 2.0]), np.array([0.5, 0.3, 0.32]))
    assert sizes.tolist() == [1, 2]
    np.testing.assert_allclose(means, [0.3, 0.4])
