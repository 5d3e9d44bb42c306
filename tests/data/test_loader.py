import importlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megarec.data.batch import Batch, carve, end_to_end
from megarec.data.loader import EvalLoader, TrainLoader, example_keys
from megarec.data.store import Store, open_split
from megarec.errors import UserError
from tests.data.prepared import SCHEMA, make_rows, write_split

ROWS, BATCH, SEED = 103, 12, 5  # 103 = 8 x 12 + 7
ROW_OF_KEY = {
    epoch: {key: row for row, key in enumerate(example_keys(np.arange(ROWS), SEED, epoch).tolist())}
    for epoch in range(3)
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    directory = tmp_path_factory.mktemp("prepared")
    write_split(directory, "train", make_rows(ROWS), shards=3)
    return open_split(directory, "train", SCHEMA, "error")


def arguments(rank: int, world_size: int, batch_size: int = BATCH) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "rank": rank,
        "world_size": world_size,
        "seed": SEED,
        "prefetch": 2,
        "pin_memory": False,
    }


def train(store: Store, rank: int = 0, world_size: int = 1) -> TrainLoader:
    return TrainLoader(store, SCHEMA, **arguments(rank, world_size))


def examples(batch: Batch) -> list[dict[str, Any]]:
    """Every example of a batch in plain Python, padding included."""
    parts = {
        name: ids.values.tolist()
        if ids.lengths is None
        else [p.tolist() for p in ids.values.split(ids.lengths.tolist())]
        for name, ids in batch.ids.items()
    }
    return [
        {"key": int(batch.keys[i]), "price": batch.numeric[i, 0].item(), "age": batch.numeric[i, 1].item()}
        | {"label": batch.labels[i].item()}
        | {name: values[i] for name, values in parts.items()}
        for i in range(batch.size)
    ]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_in_order_make_the_global_batch(store: Store, world_size: int) -> None:
    whole = [examples(batch) for batch in train(store).batches(1)]
    per_rank = [[examples(b) for b in train(store, rank, world_size).batches(1)] for rank in range(world_size)]
    assert {len(batches) for batches in per_rank} == {ROWS // BATCH}
    for index, expected in enumerate(whole):
        slices = [batches[index] for batches in per_rank]
        assert {len(part) for part in slices} == {BATCH // world_size}
        assert [example for part in slices for example in part] == expected


def test_every_row_at_most_once_an_epoch_and_itself(store: Store) -> None:
    rows, orders = make_rows(ROWS), []
    for epoch in range(3):
        seen = [example for batch in train(store).batches(epoch) for example in examples(batch)]
        order = [ROW_OF_KEY[epoch][example.pop("key")] for example in seen]
        assert len(order) == len(set(order)) == ROWS // BATCH * BATCH
        assert seen == [rows[row] for row in order]
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    assert set(orders[0]) != set(orders[1])  # other rows are left over


@pytest.mark.parametrize("start", [0, 1, 5, 8])
def test_resuming_is_starting_there(store: Store, start: int) -> None:
    loader = train(store, 1, 3)
    whole = [examples(batch) for batch in loader.batches(2)]
    assert [examples(batch) for batch in loader.batches(2, start)] == whole[start:]


def test_training_batches_are_all_valid(store: Store) -> None:
    assert {(batch.size, batch.valid) for batch in train(store, 0, 4).batches(0)} == {(3, 3)}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [12, 96, 108, 240])
def test_evaluation_sees_every_row_once(store: Store, world_size: int, batch_size: int) -> None:
    loaders = [EvalLoader(store, SCHEMA, **arguments(rank, world_size, batch_size)) for rank in range(world_size)]
    per_rank = [list(loader.batches()) for loader in loaders]
    assert {len(batches) for batches in per_rank} == {-(-ROWS // batch_size)}
    assert {batch.size for batches in per_rank for batch in batches} == {batch_size // world_size}
    in_order = [e for batches in zip(*per_rank, strict=True) for b in batches for e in examples(b)[: b.valid]]
    assert [ROW_OF_KEY[0][example.pop("key")] for example in in_order] == list(range(ROWS))
    assert in_order == make_rows(ROWS)


def test_padding_repeats_the_last_row(store: Store) -> None:
    batch = next(EvalLoader(store, SCHEMA, **arguments(3, 4, 240)).batches())
    assert batch.valid == 0 and batch.size == 60
    assert {ROW_OF_KEY[0][key] for key in batch.keys.tolist()} == {ROWS - 1}


def test_ranks_that_do_not_divide_the_batch(store: Store) -> None:
    message = r"data\.batch_size=12 does not divide by 5 ranks: 12 = 5 x 2 \+ 2; try data\.batch_size=10"
    for kind in (TrainLoader, EvalLoader):
        with pytest.raises(UserError, match=message):
            kind(store, SCHEMA, **arguments(0, 5))
    with pytest.raises(UserError, match=r"12 = 16 x 0 \+ 12; try data\.batch_size=16"):
        TrainLoader(store, SCHEMA, **arguments(0, 16))


def test_fewer_rows_than_a_batch(store: Store) -> None:
    with pytest.raises(UserError, match=r"data\.batch_size=104 exceeds the 103 training examples; .* at most 103"):
        TrainLoader(store, SCHEMA, **arguments(0, 2, 104))
    assert TrainLoader(store, SCHEMA, **arguments(0, 1, 103)).steps_per_epoch == 1


def test_an_error_in_the_background_reaches_the_consumer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*rows: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(store, "read", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        next(train(store).batches(0))


def test_a_batch_moves_as_a_whole(store: Store) -> None:
    batch = next(train(store).batches(0))
    moved = batch.to(torch.device("meta"))
    tensors = [moved.numeric, moved.labels, moved.keys]
    tensors += [t for ids in moved.ids.values() for t in (ids.values, ids.lengths) if t is not None]
    assert len(tensors) == 3 + 6 and all(tensor.is_meta for tensor in tensors)
    assert moved.valid == batch.valid


def test_a_batch_in_one_buffer_is_the_same_batch(store: Store) -> None:
    batch = next(train(store).batches(0))
    loose = Batch(batch.numeric.clone(), batch.ids, batch.labels.clone(), batch.keys.clone(), batch.valid)
    for packed in (batch, loose.in_one_buffer(pinned=False)):
        check_buffer(packed, loose)


def check_buffer(packed: Batch, batch: Batch) -> None:
    assert packed.buffer is not None
    storage = packed.buffer.untyped_storage().data_ptr()
    assert packed.to(torch.device("meta")).keys.is_meta
    for copy in (packed, packed.to(torch.device("cpu"))):
        for mine, its in ((copy.numeric, batch.numeric), (copy.labels, batch.labels), (copy.keys, batch.keys)):
            assert torch.equal(mine, its) and mine.dtype == its.dtype
            assert mine.untyped_storage().data_ptr() == storage
        for name, ids in batch.ids.items():
            assert torch.equal(copy.ids[name].values, ids.values)
            assert (copy.ids[name].lengths is None) == (ids.lengths is None)
            assert ids.lengths is None or torch.equal(copy.ids[name].lengths, ids.lengths)


def test_ids_lie_in_the_order_in_which_they_are_sent(tmp_path: Path) -> None:
    """So that sending them copies nothing; features that are sent nowhere come last."""
    write_split(tmp_path, "train", make_rows(ROWS))
    store = open_split(tmp_path, "train", SCHEMA, "error")
    store.arrange(["history", "item", "user[0:25]", "user"])
    batch = next(train(store).batches(0))
    assert batch.buffer is not None and list(batch.ids) == ["user", "tags", "item", "history"]
    values, lengths = ([getattr(batch.ids[name], what) for name in names] for what, names in (
        ("values", ("item", "user")), ("lengths", ("history", "tags")),
    ))  # fmt: skip
    for parts in (values, lengths, [batch.ids["history"].values, batch.ids["tags"].values], values[:1]):
        found = end_to_end(parts)
        assert found.untyped_storage().data_ptr() == batch.buffer.untyped_storage().data_ptr()
        assert torch.equal(found, torch.cat(parts))
    for parts in (values[::-1], [values[0], values[0]], [values[0], values[1].long()], [values[0].clone(), values[1]]):
        assert torch.equal(end_to_end(parts), torch.cat(parts))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_pinned(store: Store) -> None:
    batch = next(TrainLoader(store, SCHEMA, **arguments(0, 1) | {"pin_memory": True}).batches(0))
    assert batch.numeric.is_pinned() and batch.ids["tags"].values.is_pinned() and batch.keys.is_pinned()


def test_works_from_a_fresh_open(store: Store, tmp_path: Path) -> None:
    write_split(tmp_path, "train", make_rows(ROWS), shards=1)  # other shards, same rows
    again = open_split(tmp_path, "train", SCHEMA, "error")
    first, second = (next(train(s).batches(0)) for s in (store, again))
    assert examples(first) == examples(second)


def test_large_batches_take_the_memory_of_those_that_are_gone() -> None:
    """And of no others: not of one whose smallest part is still there."""
    batch_module = importlib.import_module("megarec.data.batch")
    with mock.patch.multiple(batch_module, _LARGE=0, _spare=batch_module._Spare()):
        places = set()
        part = None
        for step in range(20):
            buffer, (whole, last) = carve([((100,), torch.int64), ((5 + step % 3,), torch.int32)], pinned=False)
            assert buffer.storage_offset() == 0 and buffer.numel() == 800 + (5 + step % 3 + 1) // 2 * 8
            places.add(whole.data_ptr())
            if step == 3:
                part = last[1:2]
                part.fill_(7)
            del buffer, whole, last
        assert len(places) == 2 and part is not None and part.item() == 7
        held = [carve([((100,), torch.int64)], pinned=False)[1][0].fill_(step) for step in range(6)]
        assert [int(values[0]) for values in held] == list(range(6))
        del held
        carve([((100,), torch.int64)], pinned=False)
        assert len(batch_module._spare._all) == 3  # that of `part`, and two that nobody has
