"""Made-up examples with a planted signal, for tests and benchmarks; they tell nothing about real quality."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megarec.data.schema import SPLITS, CategoricalFeature, Schema, save_schema
from megarec.data.writing import SplitWriter, write_dataset
from megarec.errors import UserError

_LATENT = 4
_LONGEST_LIST = 5
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Shape:
    """How many examples of what; the defaults suit a test.

    Attributes:
        examples: over all splits, 8:1:1.
        single, multi, numeric: features of each kind; the first multi-valued one shares the table of the first
            single-valued one.
        rows: rows of every table.
    """

    examples: int = 5_000
    single: int = 4
    multi: int = 2
    numeric: int = 3
    rows: int = 100
    seed: int = 1


def prepare_synthetic(shape: Shape, output: Path) -> Schema:
    """Write a synthetic data set.

    Raises:
        UserError: a size that makes no sense, or `output` cannot be written.
    """
    for name, least in (("examples", 10), ("single", 1), ("multi", 0), ("numeric", 0), ("rows", 2), ("seed", 0)):
        if getattr(shape, name) < least:
            raise UserError(f"--{name} {getattr(shape, name)}: expected at least {least}")
    return write_dataset(output, lambda partial: _write(partial, shape))


def _write(directory: Path, shape: Shape) -> Schema:
    schema = _schema(shape)
    planted = _Planted(shape)
    for number, (split, rows) in enumerate(schema.rows.items()):
        with SplitWriter(directory / split) as writer:
            for start in range(0, rows, _CHUNK):
                random = np.random.default_rng([shape.seed, number, start])
                writer.write(planted.examples(schema, min(_CHUNK, rows - start), random))
    save_schema(schema, directory)
    return schema


def _schema(shape: Shape) -> Schema:
    single = [CategoricalFeature(name=f"single_{i}", rows=shape.rows) for i in range(shape.single)]
    multi = [
        CategoricalFeature(
            name=f"multi_{i}",
            rows=shape.rows,
            multi_valued=True,
            pooling="mean" if i % 2 == 0 else "sum",
            table="single_0" if i == 0 else None,
        )
        for i in range(shape.multi)
    ]
    eighth, tenth = shape.examples * 8 // 10, shape.examples // 10
    return Schema(
        name="synthetic",
        label_rule="drawn from a planted factorization machine",
        categorical=tuple(single + multi),
        numeric=tuple(f"numeric_{i}" for i in range(shape.numeric)),
        rows=dict(zip(SPLITS, (eighth, tenth, shape.examples - eighth - tenth), strict=True)),
        source=f"synthetic (made up, seed {shape.seed}): for tests and benchmarks only",
    )


class _Planted:
    """The model behind the labels: P(1) = sigmoid(sum of pairwise products of latent vectors + numeric terms)."""

    def __init__(self, shape: Shape) -> None:
        random = np.random.default_rng([shape.seed, 1_000])
        tables = shape.single + shape.multi
        self._latent = random.normal(size=(tables, shape.rows, _LATENT)).astype(np.float32)
        self._weights = random.normal(size=shape.numeric)
        pairs = tables * (tables - 1) / 2 * _LATENT
        self._scale = 2 / np.sqrt(max(pairs, 1))

    def examples(self, schema: Schema, count: int, random: np.random.Generator) -> pa.Table:
        columns: dict[str, pa.Array] = {}
        total = np.zeros((count, _LATENT))
        squares = np.zeros((count, _LATENT))
        for feature, latent in zip(schema.categorical, self._latent, strict=True):
            lengths = random.integers(0, _LONGEST_LIST + 1, count) if feature.multi_valued else np.ones(count, int)
            values = _skewed_ids(random, int(lengths.sum()), feature.rows)
            owner = np.repeat(np.arange(count), lengths)
            vector = np.zeros((count, _LATENT))
            np.add.at(vector, owner, latent[values] / lengths[owner][:, None])
            total += vector
            squares += vector**2
            offsets = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))
            ids = pa.array(values)
            columns[feature.name] = pa.ListArray.from_arrays(offsets, ids) if feature.multi_valued else ids
        numbers = random.normal(size=(count, len(schema.numeric)))
        columns.update((name, pa.array(numbers[:, i], pa.float32())) for i, name in enumerate(schema.numeric))
        logit = self._scale * ((total**2 - squares) / 2).sum(1) + numbers @ self._weights
        labels = random.random(count) < 1 / (1 + np.exp(-logit))
        columns[schema.label] = pa.array(labels.astype(np.int8))
        return pa.table(columns)


def _skewed_ids(random: np.random.Generator, count: int, rows: int) -> np.ndarray:
    """Ids with a popular head, as real ones have: floor(rows * u^2)."""
    return (rows * random.random(count) ** 2).astype(np.int64)
