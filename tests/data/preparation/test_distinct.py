"""Distinct values, places and counts are those of plain Python, whatever the range of the values."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from megarec.data.preparation.distinct import order_of, places_of, summed

SMALLEST, LARGEST = -(1 << 63), (1 << 63) - 1
INTEGERS = {
    "few": [3, 1, 3, None, 2, 1, 3],
    "none there": [None, None],
    "no rows": [],
    "all alike": [7] * 300,
    "256 of them": [*range(256), *range(256)],
    "256 of them, one missing": [*reversed(range(256)), None],
    "32 bits": [0, (1 << 32) - 1, 1 << 31, (1 << 31) - 1, 0],
    "more than 32 bits": [0, 1 << 32, 5, 1 << 32],
    "both ends": [SMALLEST, LARGEST, 0, None, SMALLEST],
    "at the upper end": [LARGEST, LARGEST - 1, LARGEST],
    "at the lower end": [SMALLEST + 1, SMALLEST],
}


@pytest.mark.parametrize("values", INTEGERS.values(), ids=INTEGERS)
def test_numbers(values: list[int | None]) -> None:
    _check(pa.array(values, pa.int64()), values)


def test_text() -> None:
    values = ["b", "a", None, "b", "", "ä", "b"]
    _check(pa.array(values), values)


def test_a_part_of_an_array() -> None:
    _check(pa.array([9, None, 4, 9, None, 4, 8], pa.int64()).slice(1, 5), [None, 4, 9, None, 4])


def test_many_values() -> None:
    random = np.random.default_rng(1)
    for most in (300, 1 << 20, 1 << 40):
        numbers = random.integers(-most, most, 70_000)
        distinct, places, counts = places_of(pa.array(numbers))
        wanted = np.unique(numbers, return_inverse=True, return_counts=True)
        for found, right in zip((distinct.to_numpy(), places, counts), wanted, strict=True):
            np.testing.assert_array_equal(found, right)
        np.testing.assert_array_equal(order_of(numbers), np.argsort(numbers, kind="stable"))


def test_counts_of_runs_are_summed() -> None:
    runs = [([1, 5, 9], [1, 2, 3]), ([-4, 5], [2**31 - 1, 2**31 - 1]), ([5], [4])]
    values, counts = summed([np.array(v, np.int64) for v, _ in runs], [np.array(c, np.int32) for _, c in runs])
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {-4: 2**31 - 1, 1: 1, 5: 2**31 + 5, 9: 3}
    assert values.tolist() == [-4, 1, 5, 9]


def _check(array: pa.Array, values: list[int | None] | list[str | None]) -> None:
    distinct, places, counts = places_of(array)
    there = Counter(value for value in values if value is not None)
    ordered = sorted(there, key=lambda value: value.encode() if isinstance(value, str) else value)
    assert distinct.to_pylist() == ordered
    assert counts.tolist() == [there[value] for value in ordered]
    assert places.tolist() == [len(ordered) if value is None else ordered.index(value) for value in values]
    assert places.dtype == np.min_scalar_type(len(ordered))
