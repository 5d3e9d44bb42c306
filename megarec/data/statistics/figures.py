"""Counts of all splits -> the figures of a feature, as statistics.json has them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megarec.data.schema import MADE_UP, CategoricalFeature, Schema
from megarec.data.statistics.counts import Counts, IdCounts, LabelCounts, NumberCounts
from megarec.data.statistics.drift import CANDIDATES, FALSE_ALARMS, Drift, drift_of_ids, drift_of_numbers

TOPS = (1, 10, 100)
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BINS = 40  # of a histogram; its first and last bins hold what lies further out
_ENDS = (0.005, 0.995)  # quantiles between which bins lie
_POINTS = 40  # of a frequency curve
_TALLIED = 1 << 16  # smaller counts are tallied, larger ones kept
_BLOCK = 1 << 18  # rows of a table that are looked at at a time


@dataclass(frozen=True)
class SplitLabels:
    """Labels of a split.

    Attributes:
        rate: share of labels that are 1; None: there are no labels.
        interval: of the rate, 95 %, by Wilson.
        invalid: rows whose label is neither 0 nor 1.
        missing: rows that lack an optional label.
    """

    rows: int
    rate: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    invalid: int = 0
    missing: int = 0


@dataclass(frozen=True)
class Lengths:
    """Of the lists of a split; `histogram` has their number by length, the last for all from there on."""

    mean: float
    longest: int
    empty: float
    histogram: list[int]


@dataclass(frozen=True)
class Numbers:
    """Numbers of a split.

    Attributes:
        missing: share of rows whose missing value was replaced; None: unknown.
        quantiles: by the share of numbers below; relative error at most 0.4 %.
        histogram: how many lie in each bin of the feature.
    """

    count: int
    invalid: int
    missing: float | None
    mean: float
    deviation: float
    least: float
    most: float
    quantiles: dict[str, float]
    histogram: list[int]


@dataclass(frozen=True)
class SplitIds:
    """Ids of a split.

    Attributes:
        values: how many there are, of lists their elements.
        distinct: how many different ones; row 0 counts where it is a value.
        row_0: share of values in row 0.
        missing: share of rows without a value, for lists the empty ones; None: unknown.
        unknown: share of the present values that are not in the vocabulary; None: there is none.
        invalid: nulls and ids outside the table.
    """

    values: int
    distinct: int
    row_0: float
    missing: float | None
    unknown: float | None
    invalid: int
    lengths: Lengths | None = None
    weights: Numbers | None = None


@dataclass(frozen=True)
class Frequent:
    """One of the most frequent ids; `value` is what the vocabulary has for it."""

    row: int
    share: float
    value: str | None = None


@dataclass(frozen=True)
class Categorical:
    """Figures of a categorical feature.

    Attributes:
        rows: of its table.
        way: how raw values became ids (`Schema.identity`).
        base: the split that the following are of.
        top: share of values that the 1, 10 and 100 most frequent ids have; without row 0 where that is no value.
        frequent: the most frequent ids.
        curve: (rank, count) of ids by frequency.
        sharing: of a hashed table, share of distinct values that share their row.
        drift: from training to each other split.
    """

    name: str
    kind: str
    rows: int
    table: str | None
    way: str
    base: str
    splits: dict[str, SplitIds]
    top: dict[str, float]
    frequent: list[Frequent]
    curve: list[tuple[int, int]]
    sharing: float | None
    drift: dict[str, Drift]
    weight_edges: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Numeric:
    """Figures of a numeric feature; `edges` are those of its bins."""

    name: str
    kind: str
    way: str
    splits: dict[str, Numbers]
    edges: list[float]
    drift: dict[str, Drift]


Feature = Categorical | Numeric
Labels = dict[str, dict[str, SplitLabels]]
"""By label, by split."""


def labels_of(counts: LabelCounts, labelled: bool, optional: bool) -> SplitLabels:
    """The figures of a split's labels."""
    missing = counts.missing if optional else 0
    if not (n := counts.count):
        return SplitLabels(counts.rows, invalid=counts.rows - missing if labelled else 0, missing=missing)
    rate, z = counts.positive / n, 1.959964
    middle, spread = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    low, high = ((middle + side * spread) / (1 + z * z / n) for side in (-1, 1))
    return SplitLabels(counts.rows, rate, (max(low, 0.0), min(high, 1.0)), counts.rows - missing - n, missing)


def numeric_figures(name: str, counts: Mapping[str, NumberCounts], schema: Schema) -> Numeric:
    """Figures of a numeric feature."""
    tallies = {split: own.tally() for split, own in counts.items()}
    edges, splits = _numbers(counts, tallies, {split: schema.missing.get(split, {}).get(name) for split in counts})
    base, probability = base_of(counts), probability_of(schema)
    drift = {
        split: drift_of_numbers(tallies[base], tallies[split], probability)
        for split in counts
        if base == "train" and split != base
    }
    return Numeric(name, "numeric", schema.identity.get(name, ""), splits, edges, drift)


def _numbers(
    counts: Mapping[str, NumberCounts],
    tallies: Mapping[str, tuple[NDArray[np.float64], Counts]],
    missing: Mapping[str, float | None],
) -> tuple[list[float], dict[str, Numbers]]:
    """(edges of bins that all splits share, figures by split)."""
    edges = _edges(*tallies[base_of(counts)])
    splits = {}
    for split, own in counts.items():
        numbers, times = tallies[split]
        place = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
        splits[split] = Numbers(
            own.count,
            own.invalid,
            missing.get(split),
            own.mean,
            float(np.sqrt(own.squares / max(own.count, 1))),
            own.least if own.count else 0.0,
            own.most if own.count else 0.0,
            {f"{share:g}": _quantile(numbers, times, share) for share in QUANTILES},
            np.bincount(place, times, len(edges) - 1).astype(np.int64).tolist(),
        )
    return [float(edge) for edge in edges], splits


def _quantile(numbers: NDArray[np.float64], times: Counts, share: float) -> float:
    """The smallest number that at least that share does not exceed."""
    if not len(numbers):
        return 0.0
    up_to = np.cumsum(times)
    return float(numbers[min(np.searchsorted(up_to, share * up_to[-1]), len(numbers) - 1)])


def _edges(numbers: NDArray[np.float64], times: Counts) -> NDArray[np.float64]:
    low, high = (_quantile(numbers, times, share) for share in _ENDS)
    whole = len(numbers) and np.array_equal(numbers, np.trunc(numbers))
    if whole and high - low < BINS:  # a bin a number
        return np.arange(low, high + 2) - 0.5
    if high <= low:
        return np.array([low - 0.5, low + 0.5])
    return np.linspace(low, high, BINS + 1)


def base_of(counts: Mapping[str, object]) -> str:
    return "train" if "train" in counts else next(iter(counts))


def probability_of(schema: Schema) -> float:
    """Of a false alarm, for one feature and split."""
    return FALSE_ALARMS / max(len(schema.categorical) + len(schema.numeric), 1) / max(len(schema.rows) - 1, 1)


def zero_is_no_value(schema: Schema, name: str) -> bool:
    """Whether row 0 is for missing or unknown values, as in all data prepared from raw values."""
    text = schema.identity.get(name, MADE_UP)
    return not text.startswith(MADE_UP)


class IdFigures:
    """Gathers counts of a table range by range, so that only those of one range are held."""

    def __init__(self, feature: CategoricalFeature, schema: Schema, splits: list[str]) -> None:
        self._feature, self._schema, self._splits = feature, schema, splits
        self._no_zero = zero_is_no_value(schema, feature.name)
        self._base = splits.index(base_of(dict.fromkeys(splits)))
        self._zero = np.zeros(len(splits), np.int64)
        self._values = np.zeros(len(splits), np.int64)
        self._distinct = np.zeros(len(splits), np.int64)
        self._small = np.zeros(_TALLIED, np.int64)
        self._large: list[Counts] = []
        self._rows: list[Counts] = []
        self._counts: list[Counts] = []

    def add(self, first: int, counts: Counts) -> None:
        """Take [splits, n] counts of the rows from `first` on."""
        self._values += counts.sum(axis=1)
        if first == 0:
            self._zero = counts[:, 0].copy()
            if self._no_zero:
                counts[:, 0] = 0
        for start in range(0, counts.shape[1], _BLOCK):
            self._add(first + start, counts[:, start : start + _BLOCK])

    def _add(self, first: int, counts: Counts) -> None:
        total = counts.sum(axis=0)
        there = np.flatnonzero(total)
        counts, total = counts[:, there], total[there]
        self._distinct += np.count_nonzero(counts, axis=1)
        own = counts[self._base]
        self._small += np.bincount(own[own < _TALLIED], minlength=_TALLIED)
        self._large.append(own[own >= _TALLIED])
        pairs = [_largest(own + other, CANDIDATES) for place, other in enumerate(counts) if place != self._base]
        keep = np.unique(np.concatenate([_largest(own, max(TOPS)), *pairs]))
        self._rows.append(first + there[keep])
        self._counts.append(counts[:, keep])

    def figures(self, counts: Mapping[str, IdCounts]) -> Categorical:
        """The figures of all ranges; `counts` has what is not of one range."""
        feature, schema = self._feature, self._schema
        rows, candidates = np.concatenate(self._rows), np.concatenate(self._counts, axis=1)
        own = candidates[self._base]
        most = [place for place in _largest(own, max(TOPS)).tolist() if own[place]]
        values = max(int(self._values[self._base]), 1)
        edges: list[float] = []
        weights: dict[str, Numbers] = {}
        if feature.weighted:
            found = {split: c.weights for split, c in counts.items() if c.weights is not None}
            edges, weights = _numbers(found, {split: c.tally() for split, c in found.items()}, {})
        return Categorical(
            feature.name,
            "multi_valued" if feature.multi_valued else "categorical",
            feature.rows,
            feature.table,
            schema.identity.get(feature.name, ""),
            self._splits[self._base],
            {split: self._split(place, split, counts[split], weights.get(split)) for place, split in enumerate(counts)},
            {str(top): float(own[most[:top]].sum()) / values for top in TOPS},
            [Frequent(int(rows[place]), float(own[place]) / values) for place in most[: TOPS[1]]],
            self._curve(),
            schema.sharing.get(feature.table or feature.name),
            self._drift(rows, candidates, counts),
            edges,
        )

    def _split(self, place: int, split: str, counts: IdCounts, weights: Numbers | None) -> SplitIds:
        feature, schema = self._feature, self._schema
        values = int(self._values[place])
        row_0 = float(self._zero[place]) / max(values, 1)
        unknown = schema.unknown.get(split, {}).get(feature.name)
        counted = schema.identity.get(feature.name, "").startswith("vocabulary")
        missing: float | None = None
        lengths = None
        if feature.multi_valued:
            lists = max(int(counts.lengths.sum()), 1)
            used = counts.lengths[: counts.longest + 1].tolist()
            lengths = Lengths(counts.elements / lists, counts.longest, used[0] / lists, used)
            missing = lengths.empty
        elif (share := schema.missing.get(split, {}).get(feature.name)) is not None:
            missing = share
        elif self._no_zero and (not counted or not row_0):
            missing = row_0  # of a hash or of buckets, where every value is known
        elif unknown is not None and unknown < 1:
            missing = max(0.0, round(1 - (1 - row_0) / (1 - unknown), 6))  # of earlier versions: row 0 is either
        if unknown is None and counted:
            unknown = row_0
        return SplitIds(values, int(self._distinct[place]), row_0, missing, unknown, counts.invalid, lengths, weights)

    def _curve(self) -> list[tuple[int, int]]:
        large = -np.sort(-np.concatenate(self._large))
        sizes = np.flatnonzero(self._small[1:])[::-1] + 1
        counts = np.concatenate([large, sizes])
        up_to = np.cumsum(np.concatenate([np.ones(len(large), np.int64), self._small[sizes]]))
        if not len(counts):
            return []
        ranks = np.unique(np.round(np.geomspace(1, up_to[-1], _POINTS)).astype(np.int64))
        return [(int(rank), int(counts[np.searchsorted(up_to, rank)])) for rank in ranks]

    def _drift(self, rows: Counts, candidates: Counts, counts: Mapping[str, IdCounts]) -> dict[str, Drift]:
        if self._splits[self._base] != "train":
            return {}
        examples = [
            int(own.lengths[1:].sum()) if self._feature.multi_valued else int(self._values[place])
            for place, own in enumerate(counts.values())
        ]
        return {
            split: drift_of_ids(
                rows,
                candidates[[self._base, place]],
                (int(self._values[self._base]), int(self._values[place])),
                (examples[self._base], examples[place]),
                probability_of(self._schema),
            )
            for place, split in enumerate(self._splits)
            if place != self._base
        }


def _largest(counts: Counts, most: int) -> Counts:
    """Places of the largest counts, the largest first; of equals the first."""
    places = np.arange(len(counts))
    if len(counts) > most:  # sorting the few that can be among them; np.partition is slow where most are equal
        capped = np.minimum(counts, _TALLIED)
        as_large = np.cumsum(np.bincount(capped)[::-1])
        places = np.flatnonzero(capped >= len(as_large) - 1 - np.searchsorted(as_large, most))
    return places[np.argsort(-counts[places], kind="stable")][:most]
