"""Ids that follow a power law: touched rows and hits, against a draw."""

import numpy as np
import pytest

from megarec.planning.skew import SKEW, Reads, hits, touched_rows


@pytest.mark.parametrize(("rows", "ids"), [(50, 40), (3_000, 10_000), (200_000, 50_000)])
def test_touched_rows_are_those_of_a_draw(rows: int, ids: int) -> None:
    chance = np.arange(1, rows + 1) ** -SKEW
    drawn = np.random.default_rng(1).choice(rows, size=ids, p=chance / chance.sum())
    assert touched_rows(rows, ids) == pytest.approx(len(np.unique(drawn)), rel=0.08)


def test_hits_grow_with_the_cache_and_fall_with_the_rows() -> None:
    def at(rows: int, cache: float) -> float:
        return hits([Reads(rows, 512, 1e6), Reads(rows, 64, 1e4)], cache)

    assert at(10**6, 0) == 0 and at(1_000, 1e9) == pytest.approx(1, abs=0.01)
    assert 0.2 < at(10**7, 5e7) < at(10**7, 4e8) < at(10**5, 4e8) <= 1
    assert hits([], 1e9) == 0


def test_a_skew_of_click_logs() -> None:
    """The most popular 1 % of 40 million rows."""
    assert hits([Reads(40_000_000, 512, 1e7)], 2 * 400_000 * 512) == pytest.approx(0.82, abs=0.02)
