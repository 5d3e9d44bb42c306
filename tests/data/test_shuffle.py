import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megarec.data.loader import example_keys, permuted
from megarec.data.records import mix64


def test_mix64_is_splitmix64() -> None:
    # The first outputs of SplitMix64 from state 0 (Vigna's splitmix64.c): mix of 1x and 2x the golden increment.
    states = np.array([0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A], np.uint64)
    assert mix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**70), epoch=st.integers(0, 10**6))
def test_every_row_once(n: int, seed: int, epoch: int) -> None:
    rows = permuted(np.arange(n), n, seed, epoch)
    assert sorted(rows.tolist()) == list(range(n))


@given(n=st.integers(1, 3000), data=st.data())
def test_any_positions_can_be_asked_for(n: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), np.int64)
    assert permuted(positions, n, 3, 1).tolist() == permuted(np.arange(n), n, 3, 1)[positions].tolist()


def test_rows_beyond_memory_can_be_permuted() -> None:
    n = 10**12
    rows = permuted(np.arange(0, n, n // 1000), n, 1, 0)
    assert len(set(rows.tolist())) == len(rows) and rows.min() >= 0 and rows.max() < n
    assert abs(rows.mean() / n - 0.5) < 0.05


def test_epochs_and_seeds_differ() -> None:
    orders = [permuted(np.arange(1000), 1000, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    for i in range(4):
        for j in range(i):
            assert (orders[i] == orders[j]).mean() < 0.02  # 1 in 1,000 agree by chance


def test_each_row_is_equally_likely_everywhere() -> None:
    n, trials = 13, 4000
    counts = np.zeros((n, n))
    for seed in range(trials):
        counts[np.arange(n), permuted(np.arange(n), n, seed, 0)] += 1
    expected = trials / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert chi_square < freedom + 6 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours() -> None:
    rows = permuted(np.arange(10_000), 10_000, 1, 0)
    gaps = np.abs(np.diff(rows))
    assert abs(gaps.mean() / 10_000 - 1 / 3) < 0.02  # the mean distance of two random rows
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.05


def test_keys_are_distinct_balanced_and_depend_on_all_they_should() -> None:
    rows = np.arange(20_000)
    keys = example_keys(rows, seed=1, epoch=0)
    assert len(set(keys.tolist())) == len(rows)
    bits = keys.view(np.uint64)[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02
    for other in (example_keys(rows, seed=2, epoch=0), example_keys(rows, seed=1, epoch=1)):
        assert (keys == other).sum() == 0
        flipped = (keys ^ other).view(np.uint64)[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
        assert np.abs(flipped.mean(0) - 0.5).max() < 0.02
    assert example_keys(rows[5:9], seed=1, epoch=0).tolist() == keys[5:9].tolist()
