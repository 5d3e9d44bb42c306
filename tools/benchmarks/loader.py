"""The training loader on one rank beside bare takes of Arrow: how many shuffled examples a second.

    python tools/bench.py loader

Made-up data, batch 8,192, everything in the page cache, one thread, by the time that it has a core. Ours is the whole
way of a batch: its rows of the permutation, their records, the comparison of checksums, ids turned feature after
feature, keys, one buffer. Beside it, for the same rows, in turns, in memory and in one chunk:

    take       pyarrow's take of the records and blocks that ours reads: the same bytes, which nobody has turned yet
    columns    pyarrow's take of a table with a column a feature, what comes nearest to a batch
    copy       a plain copy of as many bytes, from one place: the floor

And by themselves, by the time that all threads have a core:

    stream     an epoch of batches straight from the shards (data.stream_rows), decoding with it
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megarec.config.sections import DataConfig
from megarec.data.loader import TrainLoader
from megarec.data.schema import CategoricalFeature, Schema
from megarec.data.store import Store, open_split
from megarec.data.stream import open_training
from megarec.data.writing import ROWS_PER_GROUP
from tools.benchmarks.interleave import interleave, median_ms

BATCH = 8_192
WINDOW = 16 * BATCH  # of the stream
ROWS_OF_A_TABLE = 100_000
REPETITIONS = 15
BYTES = 128 << 20  # of records, about: far more than a processor's cache


class Shape(NamedTuple):
    """Of an example.

    Attributes:
        longest: lists hold 0 .. longest ids, each length as often.
        wanted: examples a second; None: no aim.
    """

    singles: int
    lists: int
    numeric: int
    longest: int
    wanted: int | None


SHAPES = {
    "criteo": Shape(26, 0, 13, 0, 1_000_000),
    "criteo_lists": Shape(26, 3, 13, 10, 400_000),
    "ladder": Shape(691, 0, 64, 0, 250_000),
    "ladder_lists": Shape(519, 172, 64, 5, None),
}


def run() -> dict[str, Any]:
    """Examples a second and their bytes; `<shape>_of_take` and the like: our rate over that one's."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    pa.set_cpu_count(1)
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as directory:
            row, medians = _measure(Path(directory), shape)
        rows.append({"name": name, **row})
        ratios |= {f"{name}_of_{other}": medians[other] / medians["loader"] for other in ("take", "columns", "copy")}
    return {"name": "loader", "rows": rows, "ratios": ratios}


def _measure(directory: Path, shape: Shape) -> tuple[dict[str, Any], dict[str, float]]:
    schema, table = _write(directory, shape)
    store = open_split(directory, "train", schema, "error")
    loader = TrainLoader(store, schema, batch_size=BATCH, rank=0, world_size=1, seed=0, prefetch=1, pin_memory=False)
    stored = store.dataset.data.table.combine_chunks()
    batch = loader.batch(0, 0)
    assert batch.buffer is not None
    stream = _stream_rate(directory, schema)
    read = _bytes_read(store, batch.size)
    source, target = np.ones((2, read), np.uint8)  # written once, so that no page is new
    contestants: dict[str, Callable[[], object]] = {
        "loader": _each(loader, lambda index: loader.batch(0, index)),
        "take": _each(loader, lambda index: stored.take(pa.array(loader.rows(0, index)))),
        "columns": _each(loader, lambda index: table.take(pa.array(loader.rows(0, index)))),
        "copy": lambda: np.copyto(target, source),
    }
    seconds = interleave(contestants, REPETITIONS, clock=time.thread_time)
    medians = {name: median_ms(times) for name, times in seconds.items()}
    rates = {name: BATCH / ms * 1e3 for name, ms in medians.items()}
    row = {f"{name}_examples_per_second": rate for name, rate in rates.items()}
    return {
        "bytes_read": read / BATCH,
        "bytes_of_batch": batch.buffer.nbytes / BATCH,
        "wanted": shape.wanted,
        **row,
        "stream_examples_per_second": stream,
    }, medians


def _stream_rate(directory: Path, schema: Schema) -> float:
    """Examples of an epoch of the stream a second of all threads."""
    data = DataConfig(path=str(directory), batch_size=BATCH, stream_rows=WINDOW)
    loader = open_training(data, schema, batch_size=BATCH, rank=0, world_size=1, seed=0, prefetch=1, pin_memory=False)
    start = time.process_time()
    examples = sum(batch.size for batch in loader.batches(0))
    return examples / (time.process_time() - start)


def _each(loader: TrainLoader, take: Callable[[int], object]) -> Callable[[], object]:
    """The next global batch of the epoch, over and over."""
    state = [0]

    def step() -> object:
        state[0] = (state[0] + 1) % loader.steps_per_epoch
        return take(state[0])

    return step


def _bytes_read(store: Store, examples: int) -> int:
    """Of so many examples on average."""
    return int(sum(column.nbytes for column in store.dataset.data.table.columns) / len(store) * examples)


def _write(directory: Path, shape: Shape) -> tuple[Schema, pa.Table]:
    """A prepared split of made-up rows, and a table in memory with the same columns, ids in int32."""
    random = np.random.default_rng(0)
    per_row = 4 * (shape.singles + shape.numeric + shape.lists * (1 + shape.longest / 2))
    count = max(2 * BATCH, int(BYTES / per_row) // BATCH * BATCH)
    singles = [CategoricalFeature(name=f"s{i}", rows=ROWS_OF_A_TABLE) for i in range(shape.singles)]
    lists = [CategoricalFeature(name=f"l{i}", rows=ROWS_OF_A_TABLE, multi_valued=True) for i in range(shape.lists)]
    columns: dict[str, pa.Array] = {
        f.name: pa.array(random.integers(0, f.rows, count, dtype=np.int32)) for f in singles
    }
    for feature in lists:
        offsets = np.concatenate([[0], np.cumsum(random.integers(0, shape.longest + 1, count))]).astype(np.int32)
        values = random.integers(0, feature.rows, int(offsets[-1]), dtype=np.int32)
        columns[feature.name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    numeric = [f"x{i}" for i in range(shape.numeric)]
    columns |= {name: pa.array(random.random(count, dtype=np.float32)) for name in numeric}
    columns["label"] = pa.array(random.integers(0, 2, count).astype(np.float32))
    table = pa.table(columns)
    (directory / "train").mkdir()
    pq.write_table(table, directory / "train" / "000.parquet", compression="zstd", row_group_size=ROWS_PER_GROUP)
    schema = Schema(name="made up", categorical=(*singles, *lists), numeric=tuple(numeric), rows={"train": count})
    return schema, table
