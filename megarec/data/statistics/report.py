"""Statistics of a prepared data set: statistics.json and statistics.html, from its shards, in several processes."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megarec.data.preparation.kept_spec import SPEC_FILE, KeptSpec, read_kept
from megarec.data.preparation.table_spec import Bucketised
from megarec.data.preparation.vocabulary import vocabulary_file
from megarec.data.preparation.work import Progress, Workers
from megarec.data.schema import CategoricalFeature, Schema, load_schema, select_label
from megarec.data.statistics.counts import (
    BATCH_ROWS,
    RANGE_ROWS,
    IdCounts,
    LabelCounts,
    NumberCounts,
    batches,
    shards_of,
)
from megarec.data.statistics.figures import (
    Categorical,
    Feature,
    IdFigures,
    Labels,
    labels_of,
    numeric_figures,
    zero_is_no_value,
)
from megarec.data.statistics.page import page
from megarec.errors import UserError
from megarec.files import write_whole

JSON_FILE, PAGE_FILE = "statistics.json", "statistics.html"
_COLUMNS = 64  # that a task reads at once
LONGEST_TEXT = 200  # letters of a raw value that are kept
_FEW = 1 << 24  # values: for fewer no other process is started


@dataclass(frozen=True)
class Statistics:
    """All figures of a data set, in the order of its schema."""

    schema: Schema
    labels: Labels
    features: list[Feature]

    def as_json(self) -> dict[str, Any]:
        """As statistics.json has it."""
        return {
            "version": 1,
            "name": self.schema.name,
            "label_rule": self.schema.label_rule,
            "labels": {
                label: {split: dataclasses.asdict(own) for split, own in by_split.items()}
                for label, by_split in self.labels.items()
            },
            "bad_rows": self.schema.bad_rows,
            "features": [
                dataclasses.asdict(feature)
                | {
                    "drift": {
                        split: dataclasses.asdict(d) | {"drifted": d.excess > 0} for split, d in feature.drift.items()
                    }
                }
                for feature in self.features
            ],
        }


def write_statistics(data: Path, output: Path, workers: int = 1) -> Statistics:
    """Read the shards of a data set once and write its statistics, both files whole or not at all.

    The bytes follow from the data alone, however many workers there are.

    Args:
        output: the directory for the two files, usually the data set's own.

    Raises:
        UserError: there is no data set, a shard cannot be read, or the files cannot be written.
    """
    found = statistics(data, workers)
    content = {
        JSON_FILE: json.dumps(found.as_json(), allow_nan=False) + "\n",
        PAGE_FILE: page(found.schema, found.labels, found.features),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in content.items():
            write_whole(output / name, text.encode())
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); choose another --output") from error
    return found


def statistics(data: Path, workers: int = 1) -> Statistics:
    """The statistics of a data set; see `write_statistics`."""
    schema = load_schema(data)
    shards = shards_of(data, schema)
    tasks = list(_tasks(schema, workers))
    rows = sum(schema.rows.values())
    if rows * (len(schema.categorical) + len(schema.numeric)) < _FEW:
        workers = 1
    progress = Progress()
    labels: Labels = {}
    found: dict[str, Feature] = {}
    progress.begin("counting", sum(task.columns for task in tasks))
    with Workers(workers) as pool:
        for task, result in pool.run(partial(_figures, data, schema, shards), tasks):
            labels |= result.labels
            found |= {feature.name: feature for feature in result.features}
            progress.add(task.columns)
    progress.end()
    names = [*(feature.name for feature in schema.categorical), *schema.numeric]
    return Statistics(schema, labels, [found[name] for name in names])


@dataclass(frozen=True)
class _Task:
    """Columns that are counted in one pass, or one column in several."""

    ids: tuple[CategoricalFeature, ...] = ()
    numbers: tuple[str, ...] = ()
    label: str | None = None

    @property
    def columns(self) -> int:
        return len(self.ids) + len(self.numbers) + (self.label is not None)


@dataclass(frozen=True)
class _Result:
    labels: Labels
    features: list[Feature]


def _tasks(schema: Schema, workers: int) -> Iterator[_Task]:
    """Tasks of about the same work, each with tables of RANGE_ROWS rows together at most, or with one table."""
    work = {feature.name: 1 + 2 * feature.mean_length * feature.multi_valued for feature in schema.categorical}
    most = (sum(work.values()) + len(schema.numeric)) / (4 * workers)
    yield from (_Task(label=label) for label in schema.labels or [schema.label])
    some: list[CategoricalFeature] = []
    for feature in sorted(schema.categorical, key=lambda f: -f.rows):
        if some and (
            sum(f.rows for f in some) + feature.rows > RANGE_ROWS
            or sum(work[f.name] for f in some) >= most
            or len(some) >= _COLUMNS
        ):
            yield _Task(tuple(some))
            some = []
        some.append(feature)
    if some:
        yield _Task(tuple(some))
    step = max(1, min(_COLUMNS, int(most)))
    for start in range(0, len(schema.numeric), step):
        yield _Task(numbers=schema.numeric[start : start + step])


def _figures(data: Path, schema: Schema, shards: dict[str, list[Path]], task: _Task) -> _Result:
    if task.label is not None:
        labels = {split: LabelCounts() for split in shards}
        for split, paths in shards.items():
            for batch in batches(paths, select_label(schema, task.label), [task.label] * schema.labelled):
                labels[split].add(batch)
        optional = task.label in schema.optional
        found = {split: labels_of(own, schema.labelled, optional) for split, own in labels.items()}
        return _Result({task.label: found}, [])
    features: list[Feature] = []
    if task.numbers:
        numbers = {name: {split: NumberCounts() for split in shards} for name in task.numbers}
        for split, paths in shards.items():
            for batch in batches(paths, schema, task.numbers):
                for name in task.numbers:
                    numbers[name][split].add(batch.column(name))
        features += [numeric_figures(name, counts, schema) for name, counts in numbers.items()]
    if task.ids:
        features += _counted(data, schema, shards, task.ids)
    return _Result({}, features)


def _counted(
    data: Path, schema: Schema, shards: dict[str, list[Path]], features: tuple[CategoricalFeature, ...]
) -> Iterable[Feature]:
    """Figures of categorical features; the next range of a large table is counted while ids lie beyond the last."""
    splits = list(shards)
    sizes = {feature.name: min(feature.rows, RANGE_ROWS) for feature in features}
    blocks = {name: np.zeros((len(splits), size), np.int64) for name, size in sizes.items()}
    counts = {
        name: {split: IdCounts(block[place]) for place, split in enumerate(splits)} for name, block in blocks.items()
    }
    gathered = {feature.name: IdFigures(feature, schema, splits) for feature in features}
    first: int | None = 0
    while first is not None:
        for split, paths in shards.items():
            columns = [c for f in features for c in (f.name, *[f.weights_column] * (f.weighted and first == 0))]
            for batch in batches(paths, schema, columns):
                for feature in features:
                    counts[feature.name][split].add(batch, feature, first)
        for name, block in blocks.items():
            gathered[name].add(first, block)
        after = [own.after for by_split in counts.values() for own in by_split.values() if own.after is not None]
        first = min(after, default=None)
        for name, block in blocks.items() if first is not None else ():
            block[:] = 0
            for own in counts[name].values():
                own.after = None
    kept = read_kept(data / SPEC_FILE) if (data / SPEC_FILE).is_file() else None
    return [_with_values(gathered[f.name].figures(counts[f.name]), data, schema, kept) for f in features]


def _with_values(found: Categorical, data: Path, schema: Schema, kept: KeptSpec | None) -> Categorical:
    """The most frequent ids with their raw values, where the vocabulary has them among its first values."""
    column = None if kept is None else kept.spec.columns.get(found.name)
    if kept is not None and isinstance(column, Bucketised):
        texts = _buckets(kept.fitted.boundaries[found.name])
    else:
        hexadecimal = not isinstance(column, Bucketised) and getattr(column, "dtype", None) == "hexadecimal"
        path = vocabulary_file(data, found.table or found.name)
        if not zero_is_no_value(schema, found.name) or not path.is_file():
            return found
        try:
            with pq.ParquetFile(path) as file:
                head = next(file.iter_batches(BATCH_ROWS, columns=["value"], use_threads=False), None)
        except (OSError, pa.ArrowException) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"{path}: cannot be read ({why}); prepare the data again") from error
        values = [] if head is None else head.column(0).to_pylist()
        texts = [f"{value:x}" if hexadecimal else str(value)[:LONGEST_TEXT] for value in values]
    frequent = [
        dataclasses.replace(one, value=texts[one.row - 1]) if 0 < one.row <= len(texts) else one
        for one in found.frequent
    ]
    return dataclasses.replace(found, frequent=frequent)


def _buckets(boundaries: list[float]) -> list[str]:
    """What each bucket holds."""
    between = [f"{low:g} to {high:g}" for low, high in pairwise(boundaries)]
    return [f"below {boundaries[0]:g}", *between, f"from {boundaries[-1]:g}"]
