"""Sorted runs of values and counts -> the vocabulary of a table, in bounded memory.

Every piece has its distinct values in their order (scan.py), so that a range of values is a slice of each. Ranges of
about MERGE_VALUES values are merged one after the other; each gives a sorted run of kept values. The row of a value
follows from how many values are more frequent, or as frequent and smaller: a histogram of counts gives that without
sorting all of them at once. The result depends on the values and counts alone, not on pieces or ranges.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megarec.data.preparation.distinct import first_and_counts, order_of, summed
from megarec.data.preparation.piece_files import Mapped, Runs
from megarec.data.preparation.scan import Piece
from megarec.data.preparation.vocabulary import (
    OUT_OF_VOCABULARY,
    Hashing,
    identity_of,
    in_order,
    read_values,
    vocabulary_file,
)
from megarec.files import renamed_to, write_whole

MERGE_VALUES = 1 << 21
_MOST_TALLIED = 1 << 28  # rows of a hashed table
_SAMPLES = 64  # of every piece, from which ranges are cut
_LOOK_UP = 1 << 20  # values of a range of text that are compared at a time


@dataclass(frozen=True)
class Table:
    """How the values of a table become rows.

    Attributes:
        values: distinct values that were merged.
        shared: of hashed values, how many share their row with another.
    """

    rows: int
    identity: str
    values: int
    shared: int | None = None

    @staticmethod
    def load(path: Path) -> "Table | None":
        try:
            return Table(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


@dataclass(frozen=True)
class MergeTask:
    """The work of one table.

    Attributes:
        number: of the table; names its files.
        runs: `words` files of the pieces whose values count, with the features whose values these are.
        hashing: rows by hash; None: a vocabulary of what is seen `min_count` times.
        given: a prepared data set whose vocabulary is used.
    """

    number: int
    name: str
    kind: pa.DataType
    runs: tuple[tuple[Path, str], ...]
    min_count: int = 1
    hashing: Hashing | None = None
    given: Path | None = None


def runs_of(pieces: list[Piece], directory: Path, features: list[str]) -> tuple[tuple[Path, str], ...]:
    return tuple((piece.path(directory, "words"), feature) for piece in pieces for feature in features)


def look_up_file(directory: Path, number: int) -> Path:
    """Where `merge` leaves values in their order, beside their rows."""
    return directory / f"{number:06d}.arrow"


def merge(directory: Path, data: Path, task: MergeTask) -> Table:
    """Merge the values of one table; an existing result is not merged again.

    Args:
        directory: of look-up files.
        data: the data set in the making; the vocabulary goes below it.
    """
    done = directory / f"{task.number:06d}.json"
    before = Table.load(done)
    if before is not None and (task.hashing is not None or vocabulary_file(data, task.name).is_file()):
        return before
    found = _given(directory, data, task) if task.given is not None else _merged(directory, data, task)
    write_whole(done, json.dumps(vars(found)).encode())
    return found


def _given(directory: Path, data: Path, task: MergeTask) -> Table:
    """The vocabulary of another data set, with its rows."""
    assert task.given is not None
    values = read_values(task.given, task.name)
    target = look_up_file(directory, task.number)
    with renamed_to(target) as partial, Runs(partial, task.kind, "row") as runs:
        runs.write(*in_order(values))
    parts = (values.slice(start, MERGE_VALUES) for start in range(0, len(values), MERGE_VALUES))
    identity = _write_vocabulary(target, data, task.name, task.kind, parts)
    return Table(len(values) + 1, identity, len(values))


def _merged(directory: Path, data: Path, task: MergeTask) -> Table:
    target = look_up_file(directory, task.number)
    with renamed_to(target) as counted:
        seen, histogram, shared = _count(task, counted)
        if task.hashing is not None:
            return Table(task.hashing.rows, task.hashing.identity, seen, shared)
        rank, file = _Ranking(histogram), Mapped(counted)
        with renamed_to(counted) as ranked, Runs(ranked, task.kind, "row") as runs:
            for batch in file.batches:
                runs.write(batch.column(0), rank.rows(batch.column(1).to_numpy()))
                file.release()
    kept = sum(histogram.values())
    identity = _write_vocabulary(target, data, task.name, task.kind, _by_row(Mapped(target), kept))
    return Table(kept + 1, identity, seen)


def _count(task: MergeTask, target: Path) -> tuple[int, dict[int, int], int | None]:
    """Write the values that are kept, in their order, with their counts, or with their rows if those are by hash.

    Returns:
        Distinct values, how many of the kept have each count, and how many hashed ones share their row.
    """
    seen, histogram = 0, dict[int, int]()
    sharing = _Sharing(task.hashing)
    with Runs(target, task.kind, "count") as runs:
        for values, counts in ranges(task):
            seen += len(values)
            if task.hashing is not None:
                counts = task.hashing.encode(values)
                sharing.add(counts)
            else:
                keep = counts >= task.min_count
                values, counts = values.filter(pa.array(keep)), counts[keep]
                for entry in pa.array(counts).value_counts().to_pylist():
                    histogram[entry["values"]] = histogram.get(entry["values"], 0) + entry["counts"]
            runs.write(values, counts)
    return seen, histogram, sharing.shared


class _Sharing:
    """Counts hashed values that share their row, by a byte a row; None where that would be too many bytes."""

    def __init__(self, hashing: Hashing | None) -> None:
        self._used = np.zeros(hashing.rows if hashing and hashing.rows <= _MOST_TALLIED else 0, np.uint8)
        self._values = 0

    def add(self, rows: NDArray[np.int64]) -> None:
        self._values += len(rows)
        if len(self._used):
            here, times = np.unique(rows, return_counts=True)
            self._used[here] = np.minimum(self._used[here] + np.minimum(times, 2), 2)

    @property
    def shared(self) -> int | None:
        return self._values - int(np.count_nonzero(self._used == 1)) if len(self._used) else None


def ranges(task: MergeTask) -> Iterator[tuple[pa.Array, NDArray[np.int64]]]:
    """Distinct values and their counts, range by range in the order of the values."""
    files = {path: Mapped(path) for path, _ in task.runs}
    runs = []
    for path, feature in task.runs:
        [words] = files[path].batches
        values = words.column(f"{feature}:values").flatten()
        if len(values):
            runs.append((values, words.column(f"{feature}:counts").flatten(), files[path]))
    starts = [0] * len(runs)
    for bound in [*_bounds([(values, file) for values, _, file in runs]), None]:
        ends = []
        for values, _, file in runs:
            ends.append(len(values) if bound is None else place(values, bound))
            file.release()  # a search touches pages all over the run, and each maps its neighbours
        parts = [
            (run[0].slice(start, end - start), run[1].slice(start, end - start))
            for run, start, end in zip(runs, starts, ends, strict=True)
            if end > start
        ]
        starts = ends
        if parts:
            yield _together([values for values, _ in parts], [counts for _, counts in parts])
        for file in files.values():
            file.release()


def _together(values: list[pa.Array], counts: list[pa.Array]) -> tuple[pa.Array, NDArray[np.int64]]:
    """The distinct values of sorted runs, in their order, and the sums of their counts."""
    if len(values) == 1:
        return values[0], counts[0].to_numpy().astype(np.int64)
    if pa.types.is_integer(values[0].type):
        numbers, sums = summed([part.to_numpy() for part in values], [part.to_numpy() for part in counts])
        return pa.array(numbers), sums
    table = pa.table([pa.chunked_array(values), pa.chunked_array(counts)], names=["value", "n"])
    table = table.group_by("value", use_threads=False).aggregate([("n", "sum")]).sort_by("value")
    return table["value"].combine_chunks(), table["n_sum"].combine_chunks().to_numpy()


def _bounds(runs: list[tuple[pa.Array, Mapped]]) -> list[Any]:
    """Values that cut all runs into ranges of about MERGE_VALUES values."""
    total = sum(len(values) for values, _ in runs)
    ranges = -(-total // MERGE_VALUES)
    if ranges <= 1:
        return []
    weighted: list[tuple[Any, int]] = []
    for values, file in runs:
        weighted += ((values[i * len(values) // _SAMPLES].as_py(), len(values)) for i in range(_SAMPLES))
        file.release()
    weighted.sort()
    found: list[Any] = []
    below = 0.0
    for value, size in weighted:
        if below >= total * (len(found) + 1) / ranges and (not found or value > found[-1]):
            found.append(value)
        below += size / _SAMPLES
    return found


def place(values: pa.Array, bound: Any) -> int:
    """How many of sorted values are less."""
    if pa.types.is_integer(values.type):
        return int(np.searchsorted(values.to_numpy(), bound))
    return bisect_left(range(len(values)), bound, key=lambda at: values[at].as_py())


class _Ranking:
    """Rows of values that come in their order: 1 for the most frequent, ties in the order of the values."""

    def __init__(self, histogram: dict[int, int]) -> None:
        self._counts = np.array(sorted(histogram, reverse=True), np.int64)
        values = np.array([histogram[int(count)] for count in self._counts], np.int64)
        self._next = 1 + np.cumsum(values) - values

    def rows(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        order = order_of(-counts)
        ordered = counts[order]
        starts, sizes = first_and_counts(ordered)
        group = np.searchsorted(-self._counts, -ordered[starts])
        rows = np.empty(len(counts), np.int64)
        rows[order] = np.repeat(self._next[group] - starts, sizes) + np.arange(len(counts))
        self._next[group] += sizes
        return rows


def _by_row(look_up: Mapped, count: int) -> Iterator[pa.Array]:
    """The values of a look-up in the order of their rows, MERGE_VALUES at a time."""
    for start in range(1, count + 1, MERGE_VALUES):
        parts, places = [], []
        for batch in look_up.batches:
            rows = batch.column(1).to_numpy()
            inside = np.flatnonzero((rows >= start) & (rows < start + MERGE_VALUES))
            parts.append(batch.column(0).take(pa.array(inside)))
            places.append(rows[inside] - start)
            look_up.release()
        at = np.concatenate(places)
        order = np.empty(len(at), np.int64)
        order[at] = np.arange(len(at))
        yield pa.chunked_array(parts).combine_chunks().take(pa.array(order))


def _write_vocabulary(beside: Path, data: Path, name: str, kind: pa.DataType, values: Iterable[pa.Array]) -> str:
    """Write vocabulary/<name>.parquet, whole or not at all; returns its identity.

    Args:
        beside: a file of the work directory, beside which it is written.
        values: in the order of their rows, MERGE_VALUES at a time.
    """

    def written() -> Iterator[pa.Array]:
        path = vocabulary_file(data, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        schema = pa.schema([("value", kind), ("row", pa.int64())])
        start = 1
        with (
            renamed_to(path, beside) as partial,
            pq.ParquetWriter(partial, schema, use_dictionary=False) as writer,  # no value appears twice
        ):
            for part in values:
                numbers = np.arange(start, start + len(part), dtype=np.int64)
                start += len(part)
                writer.write_table(pa.table([part, numbers], schema=schema))
                yield part

    return identity_of(kind, written())


class LookUp:
    """The rows of values, from a file of `merge`; the file is mapped, so that memory is what is touched."""

    def __init__(self, path: Path) -> None:
        self._file = Mapped(path)

    def rows(self, values: pa.Array) -> NDArray[np.int64]:
        """Int64 [n]: the row of every one of sorted, distinct values; row 0 of one that is unknown."""
        found = np.full(len(values), OUT_OF_VOCABULARY, np.int64)
        start = 0
        for batch in self._file.batches:
            known = batch.column(0)
            end = start + _place_after(values.slice(start), known[len(known) - 1].as_py())
            if end > start:
                found[start:end] = _rows_in(known, batch.column(1).to_numpy(), values.slice(start, end - start))
            start = end
        self._file.release()
        return found


def _place_after(values: pa.Array, bound: Any) -> int:
    """How many of sorted values are at most `bound`."""
    at = place(values, bound)
    return at + int(at < len(values) and values[at].as_py() == bound)


def _rows_in(known: pa.Array, rows: NDArray[np.int64], values: pa.Array) -> NDArray[np.int64]:
    if pa.types.is_integer(known.type):
        numbers, wanted = known.to_numpy(), values.to_numpy()
        at = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
        return np.where(numbers[at] == wanted, rows[at], OUT_OF_VOCABULARY)
    found = np.full(len(values), OUT_OF_VOCABULARY, np.int64)
    for start in range(0, len(known), _LOOK_UP):
        at = pc.index_in(known.slice(start, _LOOK_UP), value_set=values)
        there = at.is_valid().to_numpy(zero_copy_only=False)
        found[at.drop_null().to_numpy(zero_copy_only=False)] = rows[start : start + _LOOK_UP][there]
    return found
