"""The first half of a preparation: a unit of input -> pieces, in which every id is a number of the piece's own.

A piece is two Arrow files. `words` has, by feature, the piece's distinct values in their order, and how often each is
there; `rows` has, row by row, the place of each value among them (the number of values where it is missing), and
numbers and labels as they will be written, except numbers that are standardised later. What follows (merge.py,
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
from megarec.data.preparation.roles import group_ids, row_weights, times
from megarec.data.preparation.splits import Placing
from megarec.data.preparation.table_reader import Part, Unit, read_unit, usable
from megarec.data.preparation.table_spec import Bucketised, Categorical, Group, Label, Lists, Numeric, TableSpec
from megarec.data.preparation.text_files import BadRow
from megarec.data.preparation.values import bucket_values, id_lists, id_values, labels, numbers, weights
from megarec.data.schema import SPLITS
from megarec.files import write_whole

PIECE_ROWS = 1 << 18
PIECE_BYTES = 1 << 26
Key = str | tuple[str, str]  # a column; what belongs to it


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
    """The result of a unit.

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
    spec: TableSpec, directory: Path, most_bad: int | None, placing: Placing | None, task: tuple[int, Unit]
) -> Scanned:
    """Read a unit into pieces: a pure function of the unit and the spec.

    Args:
        directory: of pieces; a unit that is finished is not read again.
        most_bad: bad rows after which reading stops; None: never.
        placing: how rows are split; None: all are of the unit's split.
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
        for split, some in _divided(part, number, unit.split, placing, bad, most_bad):
            for few, encoded in usable(some, lambda few: values_of(few, features), bad, most_bad):
                gathered.setdefault(split, _Gathered(features)).add(len(few.numbers), encoded, some.rows.nbytes)
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


def _divided(
    part: Part, unit: int, split: str, placing: Placing | None, bad: list[BadRow], most_bad: int | None
) -> Iterator[tuple[str, Part]]:
    if placing is None:
        yield split, part
        return
    for some, places in usable(part, lambda some: placing.places(unit, some), bad, most_bad):
        for place, name in enumerate(SPLITS):
            if (keep := places == place).any():
                yield name, some.only(keep)


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
            found[name], found[name, "present"] = numbers(part, name, column)
            if not column.standardise:
                found[name] = found[name].astype(np.float32)
        elif isinstance(column, Label):
            found[name] = labels(part, name, column.optional)
        elif column.type == "weight":
            found[name] = row_weights(part, name)
        elif isinstance(column, Group):
            found[name] = group_ids(part, name, column)
        elif column.type == "time":
            found[name] = times(part, name)
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
            elif isinstance(column, Label) and name in self._values:
                rows[name] = pa.concat_arrays(self._values.pop(name))
            elif name in self._values:
                numbers_here = self._joined(name)
                rows[name] = pa.array(numbers_here)
                if isinstance(column, Numeric):
                    there = self._joined((name, "present"))
                    present[name] = int(np.count_nonzero(there))
                    if column.standardise:
                        moments[name] = moments_of(numbers_here[there])
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
