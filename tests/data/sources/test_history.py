import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megarec.data.sources.movielens import past_items

Rating = tuple[int, int, int]


def reference(ratings: list[Rating], last: int) -> list[list[int]]:
    """What the docstring says, row by row."""
    result = []
    for user, _, moment in ratings:
        past = sorted((t, item) for u, item, t in ratings if u == user and t < moment)
        result.append([item for _, item in past][max(0, len(past) - last) :])
    return result


rating = st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(0, 8))  # few users and moments: many ties


@given(ratings=st.lists(rating, min_size=1, max_size=40), last=st.integers(1, 6))
def test_it_is_the_strict_past(ratings: list[Rating], last: int) -> None:
    user, item, timestamp = (np.array(column, np.int64) for column in zip(*ratings, strict=True))
    assert past_items(user, item, timestamp, last).to_pylist() == reference(ratings, last)


def test_equal_timestamps_are_not_the_past() -> None:
    user, item, timestamp = np.array([1, 1, 1, 2]), np.array([10, 11, 12, 13]), np.array([5, 5, 6, 9])
    assert past_items(user, item, timestamp, 9).to_pylist() == [[], [], [10, 11], []]


@given(ratings=st.lists(rating, min_size=1, max_size=30), seed=st.integers(0, 100))
def test_the_order_of_rows_in_a_file_means_nothing(ratings: list[Rating], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(ratings))
    columns = np.array(ratings, np.int64)
    straight = past_items(*columns.T, last=3).to_pylist()
    assert past_items(*columns[order].T, last=3).to_pylist() == [straight[i] for i in order]
