"""Training batches straight from the shards."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.config.sections import DataConfig
from megarec.data import blocks, cache
from megarec.data.loader import example_keys
from megarec.data.mapped import MappedFile
from megarec.data.schema import Schema
from megarec.data.stream import Stream, StreamLoader, Window, open_training
from megarec.errors import UserError
from tests.data.prepared import SCHEMA, TYPES, Row, make_rows
from tests.data.test_loader import examples

ROWS, BATCH, GROUP, SEED = 499, 12, 40, 5  # 499 = 41 x 12 + 7
WEIGHTED = SCHEMA.model_copy(
    update={"categorical": tuple(f.model_copy(update={"weighted": f.name == "history"}) for f in SCHEMA.categorical)}
)


def write(directory: Path, rows: list[Row], shards: int = 3, group: int = GROUP) -> None:
    """A split in shards of row groups; every row of lists of weights as well."""
    types = TYPES | {"history:weights": pa.list_(pa.float32())}
    for shard in range(shards):
        part = rows[len(rows) * shard // shards : len(rows) * (shard + 1) // shards]
        columns = {
            name: pa.array([[0.5] * len(r["history"]) if name == "history:weights" else r[name] for r in part], kind)
            for name, kind in types.items()
        }
        path = directory / "train" / f"{shard:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=group)


@pytest.fixture(autouse=True)
def small_pieces() -> Iterator[None]:
    with mock.patch.object(blocks, "_ROWS_PER_PIECE", 16):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prepared")
    write(directory, make_rows(ROWS))
    return directory


def loader(
    data: Path, rank: int = 0, ranks: int = 1, rows: int = 150, schema: Schema = WEIGHTED, **more: Any
) -> StreamLoader:
    config = DataConfig(path=str(data), batch_size=BATCH, stream_rows=rows, **more)
    found = open_training(
        config, schema, batch_size=config.batch_size, rank=rank, world_size=ranks, seed=SEED, prefetch=2,
        pin_memory=False,
    )  # fmt: skip
    assert isinstance(found, StreamLoader)
    return found


def test_every_row_at_most_once_an_epoch_and_itself(data: Path) -> None:
    rows, orders, stream = make_rows(ROWS), [], loader(data)
    assert stream.steps_per_epoch == ROWS // BATCH
    for epoch in range(3):
        of_key = {key: row for row, key in enumerate(example_keys(np.arange(ROWS), SEED, epoch).tolist())}
        seen = [example for batch in stream.batches(epoch) for example in examples(batch)]
        order = [of_key[example.pop("key")] for example in seen]
        assert len(order) == len(set(order)) == ROWS // BATCH * BATCH
        assert seen == [rows[row] for row in order]
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    assert set(orders[0]) != set(orders[1])  # other rows are left over


@pytest.mark.parametrize("ranks", [2, 3, 12])
def test_ranks_in_order_make_the_global_batch(data: Path, ranks: int) -> None:
    whole = [examples(batch) for batch in loader(data).batches(1)]
    of_ranks = [[examples(batch) for batch in loader(data, rank, ranks).batches(1)] for rank in range(ranks)]
    assert [[e for part in parts for e in part] for parts in zip(*of_ranks, strict=True)] == whole


@pytest.mark.parametrize("start", [0, 1, 10, 11, 41])
def test_resuming_is_starting_there_on_any_number_of_ranks(data: Path, start: int) -> None:
    """In the middle of a window, at its beginning and at the epoch's end; two ranks go on as four."""
    two = [[examples(batch) for batch in loader(data, rank, 2).batches(2)] for rank in range(2)]
    four = [[examples(batch) for batch in loader(data, rank, 4).batches(2, start)] for rank in range(4)]
    after = [[e for part in parts for e in part] for parts in zip(*four, strict=True)]
    assert [[e for part in parts for e in part] for parts in zip(*two, strict=True)][start:] == after


def test_the_rows_of_a_batch_are_those_of_a_window(data: Path) -> None:
    """At most `stream_rows` rows that lie in a row of blocks; drawn from all over it."""
    stream, read = loader(data), []

    def window(self: Stream, order: np.ndarray, start: int, count: int) -> Window:
        found = real(self, order, start, count)
        read.append(found.numbers)
        return found

    real = Stream.window
    with mock.patch.object(Stream, "window", window):
        batches = [[example["key"] for example in examples(batch)] for batch in stream.batches(0)]
    of_key = {key: row for row, key in enumerate(example_keys(np.arange(ROWS), SEED, 0).tolist())}
    assert all(len(numbers) <= 150 for numbers in read) and sum(map(len, read)) == len(batches) * BATCH
    assert max(map(len, read)) - min(map(len, read)) <= BATCH  # no small one at the end
    for numbers in read:
        inside = batches[: len(numbers) // BATCH]
        del batches[: len(numbers) // BATCH]
        assert sorted(of_key[key] for batch in inside for key in batch) == sorted(numbers.tolist())
        runs = numbers.reshape(BATCH, -1)  # each gives every batch one row
        for batch in inside:
            assert [(runs == of_key[key]).any(axis=1).argmax() for key in batch] == list(range(BATCH))


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    ranks=st.sampled_from([1, 2, 3]),
    rows=st.integers(6, 100),
    piece=st.integers(1, 40),
    epoch=st.integers(0, 3),
    bad=st.sets(st.integers(0, 40)),
)
def test_any_blocks(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], ranks: int, rows: int, piece: int, epoch: int,
    bad: set[int],
) -> None:  # fmt: skip
    """Blocks of any sizes, some with bad rows, in windows of any size: every good row, except a remainder."""
    directory = tmp_path_factory.mktemp("any")
    made = [row | ({"user": 50} if i in bad else {}) for i, row in enumerate(make_rows(sum(sizes)))]
    for shard, size in enumerate(sizes):
        first = sum(sizes[:shard])
        write(directory / f"{shard}", made[first : first + size], shards=1, group=7)
        (directory / "train").mkdir(exist_ok=True)
        (directory / f"{shard}" / "train" / "000.parquet").rename(directory / "train" / f"{shard:03d}.parquet")
    good = [row for i, row in enumerate(made) if i not in bad]
    config = DataConfig(path=str(directory), batch_size=6, stream_rows=rows, bad_rows="skip")
    with mock.patch.object(blocks, "_ROWS_PER_PIECE", piece):
        if len(good) < 6:
            with pytest.raises(UserError, match=r"exceeds the|is empty"):
                open_training(config, SCHEMA, batch_size=6, rank=0, world_size=1, seed=1, prefetch=1, pin_memory=False)
            return
        seen: list[Row] = []
        for rank in range(ranks):
            stream = open_training(
                config, SCHEMA, batch_size=6, rank=rank, world_size=ranks, seed=1, prefetch=1, pin_memory=False
            )
            assert sum(stream.store.skipped.values()) == len(made) - len(good)
            seen += [example for batch in stream.batches(epoch) for example in examples(batch)]
    of_key = {key: row for row, key in enumerate(example_keys(np.arange(len(good)), 1, epoch).tolist())}
    order = [of_key[example.pop("key")] for example in seen]
    assert len(set(order)) == len(order) == len(good) // 6 * 6
    assert seen == [good[row] for row in order]


def test_memory_is_that_of_two_windows(data: Path) -> None:
    """However many rows there are: the window that is read from and the next, in whole pieces."""
    held, most = [0], [0]

    class Counted(MappedFile):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            held[0] += self.rows
            most[0] = max(most[0], held[0])

        def __del__(self) -> None:
            held[0] -= self.rows

    with mock.patch("megarec.data.stream.MappedFile", Counted):
        for ranks in (1, 3):
            most[0] = 0
            for _ in loader(data, ranks - 1, ranks).batches(0):
                time.sleep(0.001)  # the next window is there before this one is done
            blocks_cut = 2 + 150 // GROUP
            assert 0 < most[0] <= 2 * (150 // ranks + 2 * 15 * blocks_cut)
            assert held == [0]


def test_leaving_an_epoch_ends_its_threads(data: Path) -> None:
    batches = loader(data).batches(0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_a_window_has_room_for_a_batch(data: Path) -> None:
    with pytest.raises(UserError, match=r"data\.stream_rows=11 is less than data\.batch_size=12: .* as data\.stream_r"):
        loader(data, rows=11)
    assert len(list(loader(data, rows=12).batches(0))) == ROWS // BATCH
    assert len(list(loader(data, rows=10**9).batches(0))) == ROWS // BATCH


def test_bad_rows_are_reported_as_by_the_cache(tmp_path: Path) -> None:
    rows = make_rows(100)
    rows[57]["label"] = 2
    write(tmp_path, rows, shards=2)
    with pytest.raises(UserError, match=r"001\.parquet: row 7 \(from 0\): label=2, expected 0 or 1; .*data\.bad_rows"):
        loader(tmp_path)
    assert len(loader(tmp_path, bad_rows="skip").store) == 99
    with pytest.raises(UserError, match="prepared from files without the label column"):
        loader(tmp_path, schema=WEIGHTED.model_copy(update={"labelled": False}))


@pytest.mark.parametrize("how", ["another", "nulls", "shorter", "cut", "gone"])
def test_a_shard_that_changes_while_training(data: Path, tmp_path: Path, how: str) -> None:
    """Nothing of it is trained on; the next start checks it again."""
    shutil.copytree(data / "train", tmp_path / "train")
    stream = loader(tmp_path)
    shard = tmp_path / "train" / "002.parquet"
    table = pq.read_table(shard)
    if how == "another":
        labels = table["label"].to_pylist()
        labels[100] = 1 - labels[100]
        table = table.set_column(table.schema.get_field_index("label"), "label", pa.array(labels, pa.int8()))
        pq.write_table(table, shard, row_group_size=GROUP)
    elif how == "nulls":
        place = table.schema.get_field_index("history")
        table = table.set_column(place, "history", pa.array([None] * len(table), pa.list_(pa.int64())))
        pq.write_table(table, shard, row_group_size=GROUP)
    elif how == "shorter":
        pq.write_table(table.slice(0, 100), shard, row_group_size=GROUP)
    elif how == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        shard.unlink()
    message = r"has other rows than were checked|cannot be read as parquet"
    seen = []
    with pytest.raises(UserError, match=rf"train/002\.parquet ({message})"):
        for batch in stream.batches(0):
            seen += [example["label"] for example in examples(batch)]
    assert len(seen) < ROWS
    if how == "another":
        assert len(list(loader(tmp_path).batches(0))) == ROWS // BATCH


def test_the_shards_are_checked_once(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data / "train", tmp_path / "train")
    with mock.patch("megarec.data.cache.find_defects", wraps=cache.find_defects) as checks:
        whole = [examples(batch) for batch in loader(tmp_path).batches(0)]
        assert checks.call_count == sum(-(-size // 16) for size in 3 * [40] * 4 + [6, 6, 7])
        checks.reset_mock()
        assert [examples(batch) for batch in loader(tmp_path).batches(0)] == whole
        assert checks.call_count == 0
        (index,) = (tmp_path / ".arrow").glob("train-*/blocks.arrow")
        assert index.stat().st_size < 20_000 and not list((tmp_path / ".arrow").glob("*/rows.arrow"))
        content = bytearray(index.read_bytes())
        content[len(content) // 2] ^= 1
        index.write_bytes(content)
        assert [examples(batch) for batch in loader(tmp_path).batches(0)] == whole
    assert capsys.readouterr().err == f"{index.parent}: damaged, is rebuilt\n"
