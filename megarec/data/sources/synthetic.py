"""Made-up examples with a planted signal, for tests and benchmarks; they say nothing about real quality."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megarec.data.schema import SPLITS, CategoricalFeature, Schema, made_up, save_schema
from megarec.data.writing import SplitWriter, write_dataset
from megarec.errors import UserError

MOST_EXAMPLES = 10**12
MOST_FEATURES = 10_000  # of a kind; 500 is a wide model
MOST_ROWS = 2**40  # as in schema.json
_LABEL_RULE = "drawn from a planted factorization machine"
_LATENT = 4
_LONGEST_LIST = 5
_CHUNK_ROWS = 1 << 16
_CHUNK_VALUES = 1 << 22  # of all columns: what bounds the memory over hundreds of features
_INFORMATIVE = 8  # categorical features that the label depends on
_POOL = 1024  # distinct latent vectors of a feature


@dataclass(frozen=True)
class Shape:
    """How many examples of what; the defaults suit a test.

    Attributes:
        examples: over all splits, 8:1:1.
        single, multi, numeric: features of each kind; the first multi-valued one shares the table of the first
            single-valued one.
        rows: rows of every table.
        labels: 1, or more: then a quarter of the rows lack each further one, and there is a weight column.
    """

    examples: int = 5_000
    single: int = 4
    multi: int = 2
    numeric: int = 3
    rows: int = 100
    seed: int = 1
    labels: int = 1


def check_size(option: str, value: int, least: int, most: int) -> None:
    """Refuse an option out of its range, before any work.

    Raises:
        UserError: an option is out of its range.
    """
    if value < least:
        raise UserError(f"--{option} {value}: expected at least {least}")
    if value > most:
        raise UserError(f"--{option} {value}: expected at most {most:,}")


def prepare_synthetic(shape: Shape, output: Path) -> Schema:
    """Write a synthetic data set.

    Raises:
        UserError: a size that makes no sense, or `output` cannot be written.
    """
    for name, least, most in (
        ("examples", 10, MOST_EXAMPLES),
        ("single", 1, MOST_FEATURES),
        ("multi", 0, MOST_FEATURES),
        ("numeric", 0, MOST_FEATURES),
        ("rows", 2, MOST_ROWS),
        ("seed", 0, MOST_ROWS),
        ("labels", 1, MOST_FEATURES),
    ):
        check_size(name, getattr(shape, name), least, most)
    return write_dataset(output, lambda partial: _write(partial, _schema(shape), shape.seed))


def prepare_like(like: Schema, output: Path, *, examples: int, seed: int, max_rows: int | None = None) -> Schema:
    """Write a synthetic data set with the features of a given schema, such as that of data on another machine.

    Args:
        like: the schema; its tables may be far too large for this machine.
        max_rows: tables are capped to that many rows; None: as in the schema.

    Raises:
        UserError: a size that makes no sense, or `output` cannot be written.
    """
    for name, value, least, most in (
        ("examples", examples, 10, MOST_EXAMPLES),
        ("seed", seed, 0, MOST_ROWS),
        ("max-rows", max_rows, 2, MOST_ROWS),
    ):
        if value is not None:
            check_size(name, value, least, most)
    cap = max_rows or max((feature.rows for feature in like.categorical), default=0)
    categorical = tuple(f.model_copy(update={"rows": min(f.rows, cap)}) for f in like.categorical)
    schema = Schema(
        name=like.name,
        label=like.label,
        label_rule=_LABEL_RULE,
        categorical=categorical,
        numeric=like.numeric,
        rows=split_rows(examples),
        identity=made_up(categorical, like.numeric, seed, _LABEL_RULE),
        source=f"synthetic (made up, seed {seed}) with the features of {like.name}, tables capped at {cap} rows",
    )
    return write_dataset(output, lambda partial: _write(partial, schema, seed))


def _write(directory: Path, schema: Schema, seed: int) -> Schema:
    planted = _Planted(schema, seed)
    columns = len(schema.categorical) + len(schema.numeric) + 1
    chunk = min(_CHUNK_ROWS, max(1, _CHUNK_VALUES // columns))
    for number, (split, rows) in enumerate(schema.rows.items()):
        with SplitWriter(directory / split) as writer:
            for start in range(0, rows, chunk):
                random = np.random.default_rng([seed, number, start])
                writer.write(planted.examples(min(chunk, rows - start), random))
    save_schema(schema, directory)
    return schema


def split_rows(examples: int) -> dict[str, int]:
    """Examples of each split, 8:1:1."""
    eighth, tenth = examples * 8 // 10, examples // 10
    return dict(zip(SPLITS, (eighth, tenth, examples - eighth - tenth), strict=True))


def _schema(shape: Shape) -> Schema:
    single = [CategoricalFeature(name=f"single_{i}", rows=shape.rows) for i in range(shape.single)]
    multi = [
        CategoricalFeature(
            name=f"multi_{i}",
            rows=shape.rows,
            multi_valued=True,
            pooling="mean" if i % 2 == 0 else "sum",
            table="single_0" if i == 0 else None,
            newest="last",
        )
        for i in range(shape.multi)
    ]
    categorical, numeric = tuple(single + multi), tuple(f"numeric_{i}" for i in range(shape.numeric))
    others = tuple(f"label_{i}" for i in range(1, shape.labels))
    return Schema(
        name="synthetic",
        labels=("label", *others) if others else (),
        optional=others,
        weight="weight" if others else None,
        label_rule=_LABEL_RULE,
        categorical=categorical,
        numeric=numeric,
        identity=made_up(categorical, numeric, shape.seed, _LABEL_RULE),
        rows=split_rows(shape.examples),
        source=f"synthetic (made up, seed {shape.seed}): for tests and benchmarks only",
    )


class _Planted:
    """The model behind the labels: P(1) = sigmoid(sum of pairwise products of latent vectors + numeric terms).

    The features with the fewest rows carry the signal, so that a small sample can learn it; the others are noise.
    """

    def __init__(self, schema: Schema, seed: int) -> None:
        random = np.random.default_rng([seed, 1_000])
        self._schema = schema
        informative = sorted(schema.categorical, key=lambda f: f.rows)[:_INFORMATIVE]
        self._latent = {
            f.name: random.normal(size=(min(f.rows, _POOL), _LATENT)).astype(np.float32) for f in informative
        }
        numeric = len(schema.numeric)
        self._weights = random.normal(size=numeric) / max(1.0, np.sqrt(numeric) / 2)
        pairs = len(informative) * (len(informative) - 1) / 2 * _LATENT
        self._scale = 2 / np.sqrt(max(pairs, 1))

    def examples(self, count: int, random: np.random.Generator) -> pa.Table:
        """That many rows, in the columns of the schema."""
        columns: dict[str, pa.Array] = {}
        total = np.zeros((count, _LATENT))
        squares = np.zeros((count, _LATENT))
        for feature in self._schema.categorical:
            lengths = random.integers(0, _LONGEST_LIST + 1, count) if feature.multi_valued else np.ones(count, int)
            ids = _skewed_ids(random, int(lengths.sum()), feature.rows)
            if feature.name in self._latent:
                vector = self._pooled(feature.name, ids, lengths)
                total += vector
                squares += vector**2
            offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
            columns[feature.name] = pa.ListArray.from_arrays(offsets, ids) if feature.multi_valued else pa.array(ids)
            if feature.weighted:
                weights = pa.array(random.uniform(0.5, 1.5, len(ids)), pa.float32())
                columns[feature.weights_column] = pa.ListArray.from_arrays(offsets, weights)
        numbers = random.normal(size=(count, len(self._weights)))
        columns.update((name, pa.array(numbers[:, i], pa.float32())) for i, name in enumerate(self._schema.numeric))
        logit = self._scale * ((total**2 - squares) / 2).sum(1) + numbers @ self._weights
        labels = random.random(count) < 1 / (1 + np.exp(-logit))
        columns[self._schema.label] = pa.array(labels.astype(np.int8))
        for name in self._schema.optional:  # after all else, which is the same without them
            own = logit / 2 + numbers[:, :1].sum(1) + 0.5
            drawn = (random.random(count) < 1 / (1 + np.exp(-own))).astype(np.int8)
            columns[name] = pa.array(drawn, mask=random.random(count) < 0.25)
        if self._schema.weight is not None and self._schema.optional:
            columns[self._schema.weight] = pa.array(random.uniform(0.5, 1.5, count), pa.float32())
        return pa.table(columns)

    def _pooled(self, name: str, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The mean latent vector of each example's ids; 0 where it has none."""
        latent = self._latent[name]
        owner = np.repeat(np.arange(len(lengths)), lengths)
        vector = np.zeros((len(lengths), _LATENT))
        np.add.at(vector, owner, latent[ids % len(latent)] / lengths[owner][:, None])
        return vector


def _skewed_ids(random: np.random.Generator, count: int, rows: int) -> np.ndarray:
    """Ids with a popular head, as real ones have: floor(rows * u^2)."""
    return (rows * random.random(count) ** 2).astype(np.int64)
