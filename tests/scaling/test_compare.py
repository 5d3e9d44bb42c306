"""Families beside each other: the published 40x, saturation, and the frontier."""

import math

import numpy as np
import pytest

from megarec.scaling.ladder import LADDER
from megarec.scaling.law import NoLaw, find_law
from megarec.scaling.points import Run, read_points
from megarec.scaling.study import equal_quality, frontier, large_end

NO_LAW = NoLaw(0, "")


def test_published_dcnv2_needs_about_forty_times_wukongs_compute() -> None:
    families = read_points(LADDER).families
    found = equal_quality("dcnv2", families["dcnv2"], families["wukong"], find_law(families["wukong"], replicates=100))
    # By hand: -0.43 % lies 4/5 of the way from -0.35 % at 0.53 to -0.45 % at 1.25 GFLOP/example.
    assert found.between == pytest.approx(0.53 * (1.25 / 0.53) ** 0.8, rel=1e-3)
    assert found.between is not None
    assert found.by_law_interval is not None
    assert found.cost / found.between == pytest.approx(40, rel=0.1)
    assert found.cost / found.by_law_interval[1] < 40 < found.cost / found.by_law_interval[0]
    assert not found.extrapolated


def test_published_dlrm_saturates_and_wukong_does_not() -> None:
    families = read_points(LADDER).families
    dlrm, wukong = large_end(families["dlrm"]), large_end(families["wukong"])
    assert dlrm is not None
    assert wukong is not None
    assert dlrm.span == (31, 71.2)
    assert dlrm.slope == pytest.approx(math.log(0.9964 / 0.9963) / math.log(71.2 / 31))
    half = 0.0002 / math.log(71.2 / 31)  # two sizes may differ by 0.02 % for no reason
    assert dlrm.interval == pytest.approx((dlrm.slope - half, dlrm.slope + half))
    assert dlrm.verdict == "saturated"
    assert wukong.span == (22.23, 108)
    assert wukong.verdict == "improves"
    assert large_end(families["dcnv2"]) is None


def test_noise_at_the_large_end_comes_from_the_seeds() -> None:
    from scipy.stats import t

    runs = tuple(Run(cost, loss) for cost, loss in ((1, 0.52), (1, 0.5), (4, 0.49), (4, 0.47)))
    end = large_end(runs)
    assert end is not None
    logs = np.log([[0.52, 0.5], [0.49, 0.47]])
    difference = logs[1].mean() - logs[0].mean()
    error = np.sqrt(logs.var(axis=1, ddof=1).mean())  # of a difference of two means of two
    half = t.ppf(0.975, 2) * error / math.log(4)
    assert end.noise == "seeds"
    assert end.interval == pytest.approx((difference / math.log(4) - half, difference / math.log(4) + half))
    assert end.verdict == "open"  # 6 % better, but two seeds a size cannot decide


def test_equal_quality_where_points_do_not_enclose_it() -> None:
    reference = (Run(1, 0.5), Run(2, 0.45))
    assert equal_quality("x", (Run(8, 0.6),), reference, NO_LAW).between is None
    assert equal_quality("x", (Run(8, 0.4),), reference, NO_LAW).between is None
    assert equal_quality("x", (Run(8, 0.5),), reference, NO_LAW).between == 1


def test_a_law_with_a_constant_never_reaches_what_lies_below_it() -> None:
    sizes = np.geomspace(1, 100, 8)
    reference = tuple(Run(float(size), float(0.1 * size**-0.3 + 0.45)) for size in sizes)
    found = equal_quality("x", (Run(8, 0.44),), reference, find_law(reference, replicates=20))
    assert found.by_law == math.inf and found.times_by_law is None
    assert found.extrapolated


def test_a_cost_too_small_for_a_number_gives_no_ratio() -> None:
    flat = tuple(Run(float(size), float(0.45 * size**-0.0003)) for size in np.geomspace(1, 100, 8))
    found = equal_quality("x", (Run(8, 0.62),), flat, find_law(flat, replicates=20))
    assert found.by_law == 0 and found.times_by_law is None


def test_frontier_keeps_what_nothing_cheaper_equals() -> None:
    families = {"a": (Run(1, 0.5), Run(4, 0.4), Run(8, 0.45)), "b": (Run(2, 0.5), Run(3, 0.42), Run(4, 0.41))}
    assert frontier(families) == [
        ("a", 1, pytest.approx(0.5)),
        ("b", 3, pytest.approx(0.42)),
        ("a", 4, pytest.approx(0.4)),
    ]
