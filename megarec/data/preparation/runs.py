"""Arrow files of a preparation: sorted distinct values with their counts, and whatever else a piece has."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megarec.data.preparation.roles import times
from megarec.data.preparation.table_reader import Unit, read_unit, usable
from megarec.data.preparation.table_spec import TableSpec
from megarec.data.preparation.text_files import BadRow
from megarec.files import write_whole

_RUN_ROWS = 1 << 20


def places_of(values: pa.Array) -> tuple[pa.Array, NDArray[np.int64], NDArray[np.int64]]:
    """(the distinct values in their order, the place of each value among them, how often each is there).

    A missing value has the place after the last.
    """
    encoded = values.dictionary_encode()
    distinct, count = encoded.dictionary, len(encoded.dictionary)
    order = pc.sort_indices(distinct).to_numpy().astype(np.int64)
    rank = np.empty(count + 1, np.int64)
    rank[order] = np.arange(count)
    rank[count] = count
    places = rank[pc.fill_null(encoded.indices, count).to_numpy(zero_copy_only=False)]
    return distinct.take(pa.array(order)), places, np.bincount(places, minlength=count + 1)[:count]


def one_row(values: pa.Array) -> pa.Array:
    """An array as the only row of a column of lists: arrays of different lengths then share a file."""
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def save_columns(path: Path, columns: dict[str, pa.Array]) -> int:
    """Write an Arrow file that is there whole or not at all; its size in bytes."""
    partial = path.with_suffix(".partial")
    batch = pa.RecordBatch.from_pydict(columns)
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    size = partial.stat().st_size
    partial.replace(path)
    return size


def load(path: Path) -> pa.RecordBatch:
    """The columns of a file of a piece, mapped, not read."""
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def time_runs(spec: TableSpec, directory: Path, task: tuple[int, Unit]) -> list[Path]:
    """The distinct times of a unit and their counts, in sorted runs; what lies there already is not read again.

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

    def save() -> None:
        distinct, _, counts = places_of(pa.array(np.concatenate(waiting)))
        columns = {f"{name}:values": one_row(distinct), f"{name}:counts": one_row(pa.array(counts))}
        path = directory / f"{number:06d}-{len(sizes):04d}.times.arrow"
        sizes[path.name] = save_columns(path, columns)
        waiting.clear()

    bad: list[BadRow] = []
    for part, _ in read_unit(unit, alone, bad):
        waiting += [found for _, found in usable(part, lambda some: times(some, name), bad, None)]
        bad.clear()
        if sum(map(len, waiting)) >= _RUN_ROWS:
            save()
    if waiting:
        save()
    write_whole(done, json.dumps(sizes).encode())
    return [directory / file for file in sizes]


def _finished(done: Path) -> list[Path] | None:
    try:
        sizes = json.loads(done.read_bytes())
        paths = [done.parent / name for name in sizes]
        return paths if all(path.stat().st_size == sizes[path.name] for path in paths) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
