"""The first half of a preparation: a unit of input -> pieces, in which every id is a number of the piece's own.

A piece is two Arrow files. `words` has, by feature, the piece's distinct values in their order, and how often each is
there; `rows` has, row by row, the place of each value among them (the number of values where it is missing), and
numbers and labels as they will be written, but for numbers that are standardised later. What follows (merge.py,
encode.py) never sees text again: the vocabulary is merged from sorted runs, and encoding is one look-up a distinct
value and one gather a row.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megarec.data.preparation.distinct import places_of
from megarec.data.preparation.expand import expand
from megarec.data.preparation.piece_files import one_row
from megarec.data.preparation.piece_files import save as save_batch
from megarec.data.preparation.table_reader import Part, RowRefused, Unit, read_unit
from megarec.data.preparation.table_spec import Bucketised, Categorical, Lists, Numeric, TableSpec
from megarec.data.preparation.text_files import BadRow
from megarec.data.preparation.values import bucket_values, id_lists, id_values, labels, numbers, weights
from megarec.data.schema import SPLITS
from megarec.files import write_whole

PIECE_ROWS = 1 << 18
PIECE_BYTES = 1 << 26
Key = str | tuple[str, str]  # a column; what belongs to it
_ODD, _ALL = 0x9E3779B97F4A7C15, (1 << 64) - 1
_FEW_ROWS = 256  # rows among which a bad one is looked for by itself


@dataclass(frozen=True)
class Shares:
    """Which split a row goes to, by chance.

    Attributes:
        fractions: of train, valid and test.
    """

    fractions: tuple[float, float, float]
    seed: int = 1

    def places(self, unit: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Int64 [n], the place in SPLITS of rows of a unit: a function of seed, unit and row alone."""
        mixed = numbers.astype(np.uint64) + np.uint64(((self.seed << 32) + unit) * _ODD & _ALL)
        for shift, odd in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
            mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(odd)
        drawn = (mixed ^ mixed >> np.uint64(31)).astype(np.float64) / 2.0**64
        return np.searchsorted(np.cumsum(self.fractions)[:2], drawn, side="right")


@dataclass(frozen=True)
class Piece:
    """Some rows of a split whose values are numbers of the piece's own.

    Attributes:
        present: by feature, values that are there (not missing).
        files: bytes of each of its files, by name.
        moments: by standardised column, of its numbers: how many, their mean, the sum of squares of what is left.
    """

    split: str
    rows: int
    present: dict[str, int]
    files: dict[str, int]
    moments: dict[str, list[float]]

    def path(self, directory: Path, what: str) -> Path:
        return next(directory / name for name in self.files if name.endswith(f".{what}.arrow"))


@dataclass(frozen=True)
class Scanned:
    """What became of a unit.

    Attributes:
        rows: rows read, bad ones included.
    """

    rows: int
    pieces: list[Piece]
    bad: list[BadRow]

    @staticmethod
    def load(path: Path) -> "Scanned | None":
        """What an earlier process finished; None: it is not there as a whole."""
        try:
            value = json.loads(path.read_bytes())
            pieces = [Piece(**piece) for piece in value["pieces"]]
            whole = all((path.parent / n).stat().st_size == size for p in pieces for n, size in p.files.items())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Scanned(value["rows"], pieces, [BadRow(*row) for row in value["bad"]]) if whole else None


def scanned_file(directory: Path, number: int) -> Path:
    """The file that says that unit `number` is done."""
    return directory / f"{number:06d}.json"


def scan(
    spec: TableSpec, directory: Path, most_bad: int | None, shares: Shares | None, task: tuple[int, Unit]
) -> Scanned:
    """Read a unit into pieces: a pure function of the unit and the spec.

    Args:
        directory: of pieces; a unit that lies there already is not read again.
        most_bad: bad rows after which reading on is in vain; None: never.
        shares: how rows are split; None: all are of the unit's split.
        task: the number of the unit, and the unit.

    Raises:
        UserError: the file cannot be read, or does not have the columns of the spec.
    """
    number, unit = task
    done = scanned_file(directory, number)
    if (before := Scanned.load(done)) is not None:
        return before
    pieces: list[Piece] = []
    bad: list[BadRow] = []
    gathered, read = dict[str, _Gathered](), 0

    def save(split: str) -> None:
        pieces.append(gathered.pop(split).save(directory, f"{number:06d}-{len(pieces):04d}", split))

    features = spec.features
    parts = ((part, read) for whole, read in read_unit(unit, spec, bad) for part in expand(whole, spec, bad))
    for part, read in parts:
        for split, some in _divided(part, number, unit.split, shares):
            for rows, encoded in _usable(some, features, bad, most_bad):
                gathered.setdefault(split, _Gathered(features)).add(rows, encoded, some.rows.nbytes)
            if split in gathered and gathered[split].full:
                save(split)
        if most_bad is not None and len(bad) > most_bad:
            return Scanned(read, [], bad)
    for split in sorted(gathered):
        save(split)
    found = Scanned(read, pieces, sorted(bad))
    value = {"rows": read, "pieces": [vars(piece) for piece in pieces], "bad": found.bad}
    write_whole(done, json.dumps(value).encode())
    return found


def _divided(part: Part, unit: int, split: str, shares: Shares | None) -> Iterator[tuple[str, Part]]:
    if shares is None:
        yield split, part
        return
    places = shares.places(unit, part.numbers)
    for place, name in enumerate(SPLITS):
        if (keep := places == place).any():
            yield name, part.only(keep)


def _usable(
    part: Part, spec: TableSpec, bad: list[BadRow], most_bad: int | None
) -> Iterator[tuple[int, dict[Key, Any]]]:
    """(rows, their values by column) of the rows that can be used; the others are noted in `bad`."""
    try:
        yield len(part.numbers), values_of(part, spec)
        return
    except RowRefused as refused:
        if most_bad is not None and len(bad) >= most_bad:
            bad.append(refused.bad)
            return
    for few in part.cut(_FEW_ROWS):
        while len(few.numbers):
            try:
                yield len(few.numbers), values_of(few, spec)
                break
            except RowRefused as refused:
                bad.append(refused.bad)
                few = few.without(refused.index)


def values_of(part: Part, spec: TableSpec) -> dict[Key, Any]:
    """By column, what its rule makes of the values: the ids of a list with their lengths."""
    found: dict[Key, Any] = {}
    for name, column in spec.columns.items():
        if isinstance(column, Categorical):
            found[name] = id_values(part, name, column)
        elif isinstance(column, Lists):
            found[name], found[name, "lengths"] = id_lists(part, name, column)
            if name in spec.weights:
                found[name, "weights"] = weights(part, spec.weights[name], name, column)
        elif isinstance(column, Bucketised):
            found[name] = bucket_values(part, name)
        elif isinstance(column, Numeric):
            found[name], present = numbers(part, name, column)
            if column.standardise:
                found[name, "present"] = present
            else:
                found[name] = found[name].astype(np.float32)
        elif column.type == "label":
            found[name] = labels(part, name)
    return found


@dataclass
class _Gathered:
    """Rows on their way into a piece."""

    spec: TableSpec
    rows: int = 0
    _bytes: int = 0
    _values: dict[Key, list[Any]] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        return self.rows >= PIECE_ROWS or self._bytes >= PIECE_BYTES

    def add(self, rows: int, values: dict[Key, Any], size: int) -> None:
        for name, part in values.items():
            self._values.setdefault(name, []).append(part)
        self.rows += rows
        self._bytes += size

    def save(self, directory: Path, stem: str, split: str) -> Piece:
        rows: dict[str, pa.Array] = {}
        words: dict[str, pa.Array] = {}
        present, moments = Counter[str](), dict[str, list[float]]()
        for name, column in self.spec.columns.items():
            if name in self.spec.looked_up:
                values = pa.concat_arrays(self._values.pop(name))
                present[name] = len(values) - values.null_count
                distinct, places, counts = places_of(values)
                words[f"{name}:values"] = one_row(distinct)
                words[f"{name}:counts"] = one_row(pa.array(counts))
                codes = pa.array(places)
                if not isinstance(column, Lists):
                    rows[name] = codes
                    continue
                offsets = pa.array(np.append(0, np.cumsum(self._joined((name, "lengths")))).astype(np.int32))
                rows[name] = pa.ListArray.from_arrays(offsets, codes)
                if name in self.spec.weights:
                    found = pa.array(self._joined((name, "weights")))
                    rows[f"{name}:weights"] = pa.ListArray.from_arrays(offsets, found)
            elif name in self._values:
                numbers_here = self._joined(name)
                rows[name] = pa.array(numbers_here)
                if (name, "present") in self._values:
                    moments[name] = moments_of(numbers_here[self._joined((name, "present"))])
        files = {
            path.name: save_batch(path, columns)
            for path, columns in (
                (directory / f"{stem}.rows.arrow", rows),
                (directory / f"{stem}.words.arrow", words),
            )
        }
        return Piece(split, self.rows, present, files, moments)

    def _joined(self, name: Key) -> NDArray[Any]:
        return np.concatenate(self._values.pop(name))


def moments_of(values: NDArray[np.float64]) -> list[float]:
    """How many values there are, their mean, and the sum of the squares of their differences from it."""
    if not len(values) or values.min() == values.max():  # no rounding, so that their deviation is 0
        return [float(len(values)), float(values[0]) if len(values) else 0.0, 0.0]
    mean = float(values.sum() / len(values))
    return [float(len(values)), mean, float(np.square(values - mean).sum())]
