"""A checksum of every row of a cache, over all that it holds and where: whoever reads a row compares it.

So no row that changed on its way through disk and memory is trained on, and nothing is read that is not needed.
A checksum is linear in the row's numbers modulo 2^64, with odd factors, so that a change of a single number always
shows in it; it is then mixed, and its upper half is kept. It is made against accidents, not against forgery.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(x: UInt64) -> UInt64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits, well mixed."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class StoredRows:
    """The numbers of B rows as the cache holds them.

    Attributes:
        singles: int64 [features, B], or None.
        numeric: float32 [B, features], or None.
        lists: values int64 or float32 [sum(lengths)] and lengths int64 [B] of every list column.
    """

    label: NDArray[np.float32]
    singles: NDArray[np.int64] | None
    numeric: NDArray[np.float32] | None
    lists: tuple[tuple[NDArray[Any], NDArray[np.int64]], ...]

    def columns(self) -> Iterator[UInt64]:
        """One number a row of everything that is there."""
        yield _bits(self.label)
        yield from () if self.singles is None else _bits(self.singles)
        yield from () if self.numeric is None else _bits(self.numeric).T
        for values, lengths in self.lists:
            yield lengths.view(np.uint64)
            yield _of_lists(_bits(values), lengths)


def row_checksums(salt: int, rows: NDArray[np.int64], stored: StoredRows) -> NDArray[np.int32]:
    """Int32 [B]: the checksums of these rows.

    Args:
        salt: of the cache, in [0, 2^64): a row of another one has other checksums.
        rows: int64 [B], where in the cache they stand.
    """
    total = rows.view(np.uint64) * _GOLDEN + np.uint64(salt)
    columns = list(stored.columns())
    factors = mix64(np.arange(1, len(columns) + 1, dtype=np.uint64) * _GOLDEN) | np.uint64(1)
    for column, factor in zip(columns, factors, strict=True):
        total += column * factor
    return (mix64(total) >> np.uint64(32)).astype(np.uint32).view(np.int32)


def _bits(values: NDArray[Any]) -> UInt64:
    return values.view(np.uint64) if values.dtype.itemsize == 8 else values.view(np.uint32).astype(np.uint64)


def _of_lists(values: UInt64, lengths: NDArray[np.int64]) -> UInt64:
    """A number for every list, in which each value and its place count."""
    stops = np.cumsum(lengths)
    place = np.arange(len(values), dtype=np.uint64) - np.repeat(stops - lengths, lengths).view(np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mix64(values + place * _GOLDEN))])
    found: UInt64 = sums[stops] - sums[stops - lengths]
    return found
