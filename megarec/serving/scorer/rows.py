"""Raw rows -> what the model reads: ids of every feature with the lengths of lists, and numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle, RowError, shown
from .look_ups import Ids, LookUp, load_look_up
from .values import elements, finite, moment, number

Row = Mapping[str, Any]


@dataclass
class FeatureIds:
    """Ids of one feature, row after row.

    Attributes:
        values: int64 [all ids].
        lengths: int64 [rows]; None: every row has one.
        weights: float32 [all ids]; None: all are 1.
    """

    values: Ids
    lengths: Ids | None
    weights: NDArray[np.float32] | None


@dataclass
class Encoded:
    """Rows that can be scored.

    Attributes:
        kept: their places among those that were given, rising.
        ids: by feature.
        numeric: float32 [rows, numeric features].
        errors: by place of the others, why not.
    """

    kept: list[int]
    ids: dict[str, FeatureIds]
    numeric: NDArray[np.float32]
    errors: dict[int, str] = field(default_factory=dict)


class RowEncoder:
    """Encodes rows by the rules of the data set that the model was trained on."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        missing = frozenset(manifest["null_words"])
        self._features = [
            _Feature(about, load_look_up(bundle, about["raw"], manifest["tables"][about["table"]]["rows"]), missing)
            for about in manifest["features"]
        ]
        self._together = [sequence["features"] for sequence in manifest.get("sequences", ())]
        self._numeric = [_Numeric(about, missing) for about in manifest["numeric"]]
        # The numbers of a vector, which is read once for all of them.
        self._columns = [list(same) for _, same in groupby(self._numeric, key=lambda own: own.column)]

    def encode(self, rows: Sequence[Row | RowError]) -> Encoded:
        """A row that cannot be scored is left out, with its reason; it does not change the others.

        Args:
            rows: an error takes the place of a row that could not be read.
        """
        kept, errors, read = [], {}, []
        for place, row in enumerate(rows):
            try:
                if isinstance(row, RowError):
                    raise row
                if not isinstance(row, Mapping):
                    raise RowError(f"{shown(row)}, expected an object with the columns as keys")
                numbers = [own.number(value) for same in self._columns for own, value in same[0].split(row, same)]
                found = [feature.read(row) for feature in self._features]
                self._check_lengths(found)
                read.append((found, numbers))
                kept.append(place)
            except RowError as error:
                errors[place] = str(error)
        by_feature = list(zip(*(ids for ids, _ in read), strict=True)) if read else [()] * len(self._features)
        ids = {f.name: f.gather(column) for f, column in zip(self._features, by_feature, strict=True)}
        numeric = np.array([numbers for _, numbers in read], np.float64).reshape(len(read), len(self._numeric))
        for place, column in enumerate(self._numeric):
            numeric[:, place] = column.transformed(numeric[:, place])
        return Encoded(kept, ids, numeric.astype(np.float32), errors)

    def _check_lengths(self, found: Sequence[Any]) -> None:
        """Lists that share positions have as many values, what is left out of them not counted."""
        if not self._together:
            return
        sizes = {f.name: len(values[0]) for f, values in zip(self._features, found, strict=True) if f.many}
        for first, *others in self._together:
            for other in others:
                if sizes.get(first) != sizes.get(other):
                    what = f"{sizes[other]} values, expected {sizes[first]}, one for each of {first}"
                    raise RowError(f"{other}: {what}")


class _Feature:
    def __init__(self, about: dict[str, Any], look_up: LookUp, missing: frozenset[str]) -> None:
        raw, self._missing = about["raw"], missing
        self._moment, self._written = raw.get("moment"), raw.get("format", "")
        self.name, self._look_up, self._column = about["name"], look_up, raw["column"]
        self.many, self._separator, self._weights = about["multi_valued"], raw.get("separator"), raw.get("weights")
        self._most, self._newest_first = raw.get("max_length"), raw.get("newest") == "first"

    def read(self, row: Row) -> Any:
        """A value, or lists of values and weights; None: it is missing."""
        value = _of(row, self._column, self._missing)
        try:
            if self._moment is not None:
                value = moment(value, self._written, self._moment)
            if not self.many:
                return self._look_up.read(value)
            parts = _without(elements(value, self._separator), self._missing)
            found = [self._look_up.read(element) for element in parts]
        except RowError as error:
            raise RowError(f"{self._column}={error}") from None
        weights = None if self._weights is None else self._weights_of(row, self._weights, len(found))
        keep = [place for place, element in enumerate(found) if element is not None]
        if self._most is not None:
            keep = keep[: self._most] if self._newest_first else keep[-self._most :]
        return [found[place] for place in keep], None if weights is None else [weights[place] for place in keep]

    def _weights_of(self, row: Row, column: str, wanted: int) -> list[float]:
        try:
            parts = _without(elements(_of(row, column, self._missing), self._separator), self._missing)
            found = [number(element) for element in parts]
        except RowError as error:
            raise RowError(f"{column}={error}") from None
        if len(found) != wanted:
            raise RowError(f"{column}: {len(found)} weights, expected {wanted}, one for each value of {self._column}")
        with np.errstate(over="ignore"):
            fits = np.isfinite(np.array(found, np.float32)).all()
        if not fits:
            raise RowError(f"{column}={shown(found)}, expected finite numbers")
        return found

    def gather(self, column: Sequence[Any]) -> FeatureIds:
        if not self.many:
            return FeatureIds(self._rows(column), None, None)
        lengths = np.fromiter((len(values) for values, _ in column), np.int64, len(column))
        values = self._rows([value for values, _ in column for value in values])
        weights = None
        if self._weights is not None:
            weights = np.array([weight for _, some in column for weight in some or ()], np.float32)
        return FeatureIds(values, lengths, weights)

    def _rows(self, values: Sequence[Any]) -> Ids:
        """Row 0 is for a missing value."""
        if None not in values:
            return self._look_up.rows(values)
        there = np.fromiter((value is not None for value in values), bool, len(values))
        rows = np.zeros(len(values), np.int64)
        rows[there] = self._look_up.rows([value for value in values if value is not None])
        return rows


class _Numeric:
    def __init__(self, about: dict[str, Any], null_words: frozenset[str]) -> None:
        raw, self._null_words = about["raw"], null_words
        self._place, self._length, self._separator = (raw.get(key) for key in ("place", "length", "separator"))
        self.column, self._log, self._missing, self._moments = (
            raw[key] for key in ("column", "log", "missing", "moments")
        )

    def split(self, row: Row, same: Sequence["_Numeric"]) -> Iterator[tuple["_Numeric", Any]]:
        """Each of the features of this one's column, with its raw value."""
        value = _of(row, self.column, self._null_words)
        if self._place is None:
            return zip(same, [value] * len(same), strict=True)
        try:
            parts = _without(elements(value, self._separator), self._null_words)
        except RowError as error:
            raise RowError(f"{self.column}={error}") from None
        if len(parts) != self._length and (parts or self._missing is None):
            raise RowError(f"{self.column}={shown(value)}, expected {self._length} numbers")
        return ((own, parts[own._place] if parts else None) for own in same)

    def number(self, value: Any) -> float:
        """The number of a raw value, or the replacement of a missing one."""
        try:
            found = number(value)
            if found == found:
                # With log any finite number fits.
                return found if self._log and abs(found) < np.inf else finite(found)
        except RowError as error:
            raise RowError(f"{self.column}={error}") from None
        if self._missing is None:
            raise RowError(f"{self.column} is missing, expected a number")
        return float(self._missing)

    def transformed(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        if self._log:
            values = np.sign(values) * np.log1p(np.abs(values))
        if self._moments is not None:
            values = (values - self._moments[0]) / self._moments[1]
        return values


def _of(row: Row, column: str, null_words: frozenset[str]) -> Any:
    try:
        value = row[column]
    except KeyError:
        raise RowError(f"{column} is not in the row; give every column, null where its value is missing") from None
    return None if isinstance(value, str) and value in null_words else value


def _without(values: list[Any], null_words: frozenset[str]) -> list[Any]:
    """The same, None for words that count as missing."""
    if not null_words:
        return values
    return [None if isinstance(value, str) and value in null_words else value for value in values]
