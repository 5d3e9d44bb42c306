"""What the training split decides besides vocabularies: quantiles, means and deviations;
and where time cuts splits.

Quantiles are exact: they come from the sorted runs of the pieces, a range of values at a time, as vocabularies do.
Means go piece by piece in the order of the files. So all of it follows from the files and the spec alone.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megarec.data.preparation.merge import MergeTask, ranges
from megarec.data.preparation.scan import Piece


@dataclass(frozen=True)
class Numbers:
    """The numbers of a column, in sorted runs.

    Attributes:
        runs: files that have distinct numbers and their counts, with the column.
    """

    name: str
    runs: tuple[tuple[Path, str], ...]

    @property
    def ranges(self) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Distinct numbers and their counts, range by range in ascending order."""
        for values, counts in ranges(MergeTask(0, self.name, pa.float64(), self.runs)):
            yield values.to_numpy(), counts

    @property
    def total(self) -> int:
        return sum(int(counts.sum()) for _, counts in self.ranges)


@dataclass(frozen=True)
class Quantiles:
    """The work of one column: where to cut its numbers into buckets."""

    numbers: Numbers
    buckets: int


def quantiles(task: Quantiles) -> list[float]:
    """Boundaries that cut the numbers into buckets as equal as repeated numbers allow.

    Of n sorted numbers (from 0) boundary k of b buckets is number floor(k n / b); one that separates nothing is left
    out.
    """
    total = task.numbers.total
    wanted = [k * total // task.buckets for k in range(1, task.buckets)] if total else []
    found: list[float] = []
    below, least = 0, math.nan
    for numbers, counts in task.numbers.ranges:
        least = float(numbers[0]) if math.isnan(least) else least
        up_to = below + np.cumsum(counts)
        here = [place for place in wanted if below <= place < int(up_to[-1])]
        found += numbers[np.searchsorted(up_to, here, side="right")].tolist()
        below = int(up_to[-1])
    return sorted({value for value in found if value > least})


def cuts_of(times: Numbers, fractions: tuple[float, float, float]) -> tuple[float, float]:
    """Where valid and test begin: a time goes where its first row falls, so that equal times are never cut apart."""
    total = times.total
    wanted = [round(share * total, 6) for share in (fractions[0], fractions[0] + fractions[1])]
    found = [math.inf, math.inf]
    below = 0
    for values, counts in times.ranges:
        earlier = below + np.cumsum(counts) - counts
        for place, target in enumerate(wanted):
            at = int(np.searchsorted(earlier, target, side="left"))
            if at < len(values):
                found[place] = min(found[place], float(values[at]))
        below += int(counts.sum())
    return found[0], found[1]


def mean_and_deviation(pieces: Iterable[Piece], name: str) -> tuple[float, float]:
    """For a column's numbers, without missing ones; the deviation of equal numbers is 1.

    Two samples are merged as in Chan, Golub and LeVeque (1979), so that no large sums cancel.
    """
    count, mean, squares = 0.0, 0.0, 0.0
    for piece in pieces:
        more, other, rest = piece.moments[name]
        if more:
            both, apart = count + more, other - mean
            mean += apart * (more / both)
            squares += rest + apart * apart * (count * more / both)
            count = both
    deviation = math.sqrt(squares / count) if count else 0.0
    return mean, deviation or 1.0
