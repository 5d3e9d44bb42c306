"""Which split a row of one input goes to: at random, by time, or by a column.

A split by time takes two passes: the first reads the time column alone into sorted runs, from which the exact places of
the cuts follow (fit.py); the second is the reading of all columns (scan.py).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megarec.data.preparation.distinct import places_of
from megarec.data.preparation.piece_files import one_row, save
from megarec.data.preparation.roles import split_places, times
from megarec.data.preparation.table_reader import Part, Unit, read_unit, usable
from megarec.data.preparation.table_spec import SplitColumn, TableSpec
from megarec.data.preparation.text_files import BadRow
from megarec.files import write_whole

_RUN_ROWS = 1 << 20

_ODD, _ALL = 0x9E3779B97F4A7C15, (1 << 64) - 1


@dataclass(frozen=True)
class Shares:
    """By chance.

    Attributes:
        fractions: of train, valid and test.
    """

    fractions: tuple[float, float, float]
    seed: int = 1

    def places(self, unit: int, part: Part) -> NDArray[np.int64]:
        """Int64 [n], the place in SPLITS of rows of a unit: a function of seed, unit and row alone."""
        mixed = part.numbers.astype(np.uint64) + np.uint64(((self.seed << 32) + unit) * _ODD & _ALL)
        for shift, odd in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
            mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(odd)
        drawn = (mixed ^ mixed >> np.uint64(31)).astype(np.float64) / 2.0**64
        return np.searchsorted(np.cumsum(self.fractions)[:2], drawn, side="right")


@dataclass(frozen=True)
class ByTime:
    """The earliest rows train, the latest test; where the cuts lie follows from the files.

    Attributes:
        fractions: of train, valid and test.
    """

    fractions: tuple[float, float, float]


@dataclass(frozen=True)
class ByColumn:
    """As the spec's column of type `split` says."""


@dataclass(frozen=True)
class TimeCuts:
    """`ByTime` of files whose times are known: valid begins at the first cut, test at the second."""

    name: str
    cuts: tuple[float, float]

    def places(self, unit: int, part: Part) -> NDArray[np.int64]:
        """Int64 [n], the place in SPLITS of rows.

        Raises:
            RowRefused: a row has no time.
        """
        return np.searchsorted(self.cuts, times(part, self.name), side="right").astype(np.int64)


@dataclass(frozen=True)
class Said:
    """`ByColumn` of a spec."""

    name: str
    column: SplitColumn

    def places(self, unit: int, part: Part) -> NDArray[np.int64]:
        """Int64 [n], the place in SPLITS of rows.

        Raises:
            RowRefused: a row has no valid split.
        """
        return split_places(part, self.name, self.column)


Division = Shares | ByTime | ByColumn
Placing = Shares | TimeCuts | Said


def time_runs(spec: TableSpec, directory: Path, task: tuple[int, Unit]) -> list[Path]:
    """The distinct times of a unit and their counts, in sorted runs; an existing result is not read again.

    Rows whose time cannot be read are left to the second pass, which names them.
    """
    number, unit = task
    (name,) = spec.of_type("time")
    alone = spec.ignoring({other for other in spec.columns if other != name})
    done = directory / f"{number:06d}.json"
    if (before := _finished(done)) is not None:
        return before
    sizes: dict[str, int] = {}
    waiting: list[NDArray[np.float64]] = []

    def flush() -> None:
        distinct, _, counts = places_of(pa.array(np.concatenate(waiting)))
        columns = {f"{name}:values": one_row(distinct), f"{name}:counts": one_row(pa.array(counts))}
        path = directory / f"{number:06d}-{len(sizes):04d}.times.arrow"
        sizes[path.name] = save(path, columns)
        waiting.clear()

    bad: list[BadRow] = []
    for part, _ in read_unit(unit, alone, bad):
        waiting += [found for _, found in usable(part, lambda some: times(some, name), bad, None)]
        bad.clear()
        if sum(map(len, waiting)) >= _RUN_ROWS:
            flush()
    if waiting:
        flush()
    write_whole(done, json.dumps(sizes).encode())
    return [directory / file for file in sizes]


def _finished(done: Path) -> list[Path] | None:
    try:
        sizes = json.loads(done.read_bytes())
        paths = [done.parent / name for name in sizes]
        return paths if all(path.stat().st_size == sizes[path.name] for path in paths) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
