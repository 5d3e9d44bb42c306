"""The metrics of every part of the rows that has one value in a column."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megarec.metrics.grouped import group_scores, known
from megarec.metrics.weighted import losses_of, of_sums, probabilities_of


@dataclass(frozen=True)
class Slice:
    """Rows of one value; a metric that they do not have is NaN.

    Attributes:
        value: as the column has it; None: null.
    """

    value: Any
    examples: int
    positives: int
    auc: float
    logloss: float
    ne: float
    calibration: float

    def described(self) -> dict[str, Any]:
        """As JSON can say it."""
        metrics = {name: known(getattr(self, name)) for name in ("auc", "logloss", "ne", "calibration")}
        return {"value": self.value, "examples": self.examples, "positives": self.positives, **metrics}


@dataclass(frozen=True)
class Slices:
    """Of one column.

    Attributes:
        largest: by falling number of examples, then in the order of the values.
        others: how many values are left out of it, with `other_examples` rows together.
    """

    column: str
    largest: list[Slice]
    others: int
    other_examples: int

    def described(self) -> dict[str, Any]:
        """As JSON can say it."""
        rest = {"values": self.others, "examples": self.other_examples}
        return {"column": self.column, "values": [own.described() for own in self.largest], "left_out": rest}


def slices_of(
    column: str,
    logits: NDArray[Any],
    labels: NDArray[Any],
    codes: NDArray[Any],
    values: Sequence[Any],
    most: int = 50,
) -> Slices:
    """The metrics of the rows of each value, for the `most` values with the most rows; values without rows have none.

    Args:
        logits: float [N], finite.
        labels: 0 or 1 [N].
        codes: whole numbers [N]: places in `values`; -1: null.
    """
    size = len(values) + 1
    shifted = codes.astype(np.int64) + 1  # so that null is 0
    examples = np.bincount(shifted, minlength=size)
    # A sort that keeps the order of equals: null first, then as the values come.
    chosen = np.argsort(-examples, kind="stable")[: max(most, 1)]
    chosen = chosen[examples[chosen] > 0]
    place = np.full(size, -1)
    place[chosen] = np.arange(len(chosen))
    of_row = place[shifted]
    there = of_row >= 0
    x, y, of_row = logits[there], labels[there], of_row[there]
    aucs = group_scores(x, y, of_row).auc
    sums = [
        np.bincount(of_row, weights, minlength=len(chosen))
        for weights in (y.astype(np.float64), losses_of(x, y), probabilities_of(x))
    ]
    largest = []
    for own, code in enumerate(chosen.tolist()):
        rows = int(examples[code])
        positives, loss, predicted = (float(total[own]) for total in sums)
        logloss, ne, calibration = of_sums(rows, positives, loss, predicted)
        value = values[code - 1] if code else None
        auc = float(aucs[own])
        largest.append(Slice(value, rows, int(positives), auc, logloss, ne, calibration))
    left = int((examples > 0).sum()) - len(chosen)
    return Slices(column, largest, left, len(codes) - int(examples[chosen].sum()))


def in_tenths(numbers: NDArray[Any]) -> tuple[NDArray[np.int64], list[str]]:
    """Codes and names of ten parts of equally many numbers, equal numbers together; -1 for what is not a number."""
    finite = numbers[np.isfinite(numbers)]
    if not len(finite):
        return np.full(len(numbers), -1), []
    edges = np.unique(np.quantile(finite, np.arange(1, 10) / 10, method="higher"))
    edges = edges[edges > finite.min()]
    codes = np.where(np.isfinite(numbers), np.searchsorted(edges, numbers, side="right"), -1)
    ends = [-math.inf, *edges.tolist(), math.inf]
    return codes, [_between(low, high) for low, high in itertools.pairwise(ends)]


def _between(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return "all"
    if math.isinf(low):
        return f"below {high:.6g}"
    return f"{low:.6g} and more" if math.isinf(high) else f"{low:.6g} to {high:.6g}"
