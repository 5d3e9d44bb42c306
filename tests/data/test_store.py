import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarec.data import assembler, cache
from megarec.data.schema import load_schema, select_features
from megarec.data.store import Store, open_split
from megarec.errors import UserError
from tests.data.prepared import SCHEMA, TYPES, Row, make_rows, write_prepared, write_shard, write_split


def read_back(store: Store, rows: list[int]) -> list[Row]:
    """Rows as gather returns them, taken apart into plain Python."""
    numeric, ids, labels = store.gather(np.array(rows, np.int64))
    result: list[Row] = [{} for _ in rows]
    for name, feature in ids.items():
        assert feature.values.is_contiguous()
        if feature.lengths is None:
            values = feature.values.tolist()
        else:
            assert feature.lengths.sum() == len(feature.values)
            values = [part.tolist() for part in feature.values.split(feature.lengths.tolist())]
        for row, value in zip(result, values, strict=True):
            row[name] = value
    for row, numbers, label in zip(result, numeric.tolist(), labels.tolist(), strict=True):
        row.update(price=numbers[0], age=numbers[1], label=label)
    return result


row_of_test = st.fixed_dictionaries(
    {
        "user": st.integers(0, 49),
        "tags": st.lists(st.integers(0, 8), max_size=5),
        "item": st.integers(0, 29),
        "history": st.lists(st.integers(0, 29), max_size=3),
        "price": st.floats(-1e6, 1e6, width=32),
        "age": st.floats(0, 100, width=32),
        "label": st.integers(0, 1),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(row_of_test, min_size=1, max_size=60),
    shards=st.integers(1, 3),
    per_batch=st.integers(1, 20),
    per_tile=st.integers(1, 40),
    data=st.data(),
)
def test_gather_returns_the_rows_asked_for(
    rows: list[Row], shards: int, per_batch: int, per_tile: int, data: st.DataObject
) -> None:
    wanted = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=30))
    order = data.draw(st.permutations(["user", "tags", "item", "history"]))
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.object(cache, "_ROWS_PER_RECORD_BATCH", per_batch),
        mock.patch.multiple(assembler, _TILE_BYTES=0, _FEWEST_ROWS=per_tile),
    ):
        write_split(Path(name), "train", rows, shards)
        store = open_split(Path(name), "train", SCHEMA, "error")
        assert len(store) == len(rows)
        store.arrange(order)
        assert read_back(store, wanted) == [rows[i] for i in wanted]


def test_lists_that_share_positions_are_equally_long_in_every_row_that_is_read(tmp_path: Path) -> None:
    """tags has i % 4 values, history 5 i % 6: alike in rows 0, 3 and 15, not in 19."""
    write_prepared(tmp_path)
    store = open_split(tmp_path, "train", SCHEMA, "error")
    read_back(store, [15, 1])
    store.arrange(["user"], [["history", "tags"]])
    assert [row["tags"] for row in read_back(store, [15, 0, 3])] == [[6, 7, 8], [], [3, 4, 5]]
    message = "row 19 .from 0. has 5 values of history and 3 of tags: .* must be equally long"
    with pytest.raises(UserError, match=message):
        read_back(store, [0, 19, 1])


def test_types_and_order(tmp_path: Path) -> None:
    write_prepared(tmp_path)
    store = open_split(tmp_path, "valid", load_schema(tmp_path), "error")
    numeric, ids, labels = store.gather(np.array([3, 3]))
    assert (str(numeric.dtype), str(labels.dtype)) == ("torch.float32", "torch.float32")
    assert list(ids) == ["user", "tags", "item", "history"]
    assert {str(feature.values.dtype) for feature in ids.values()} == {"torch.int32"}
    assert store.skipped == {}
    assert store.dataset.num_rows == len(store) == 40
    with pytest.raises(AssertionError):
        store.gather(np.array([40]))


@pytest.mark.parametrize("names", [["user"], ["tags"], ["price", "item"], ["age"]])
def test_a_selection_reads_its_columns_only(tmp_path: Path, names: list[str]) -> None:
    rows = write_prepared(tmp_path)
    store = open_split(tmp_path, "train", select_features(load_schema(tmp_path), names), "error")
    numeric, ids, labels = store.gather(np.arange(40))
    assert list(ids) == [name for name in names if name in ("user", "tags", "item")]
    assert numeric.tolist() == [[row[name] for name in names if name in ("price", "age")] for row in rows]
    assert labels.tolist() == [row["label"] for row in rows]
    if "item" in ids:
        assert ids["item"].values.tolist() == [row["item"] for row in rows]


def test_a_table_beyond_32_bits(tmp_path: Path) -> None:
    schema = SCHEMA.model_copy(
        update={"categorical": (SCHEMA.categorical[0].model_copy(update={"rows": 2**33}), *SCHEMA.categorical[1:])}
    )
    rows = [row | {"user": 2**33 - 1 - i} for i, row in enumerate(make_rows(20))]
    write_split(tmp_path, "train", rows)
    store = open_split(tmp_path, "train", schema, "error")
    assert read_back(store, [19, 3, 3]) == [rows[19], rows[3], rows[3]]
    _, ids, _ = store.gather(np.arange(2))
    assert {str(t.dtype) for of in ids.values() for t in (of.values, of.lengths) if t is not None} == {"torch.int64"}


def test_weights_follow_their_lists(tmp_path: Path) -> None:
    features = [f.model_copy(update={"weighted": f.name == "history"}) for f in SCHEMA.categorical]
    schema = SCHEMA.model_copy(update={"categorical": tuple(features)})
    rows = [row | {"history:weights": [i + j / 8 for j in range(i * 5 % 6)]} for i, row in enumerate(make_rows(30))]
    write_shard(tmp_path / "train" / "000.parquet", rows, TYPES | {"history:weights": pa.list_(pa.float32())})
    store = open_split(tmp_path, "train", schema, "error")
    store.arrange(["history", "user", "tags"])
    assert read_back(store, [7, 29, 0]) == [
        {name: value for name, value in rows[i].items() if name != "history:weights"} for i in (7, 29, 0)
    ]
    _, ids, _ = store.gather(np.array([7, 29, 0]))
    assert ids["history"].weights is not None and ids["tags"].weights is None
    assert ids["history"].weights.tolist() == [w for i in (7, 29, 0) for w in rows[i]["history:weights"]]


def test_lists_that_are_all_empty(tmp_path: Path) -> None:
    rows = [row | {"tags": []} for row in make_rows(20)]
    write_split(tmp_path, "train", rows)
    store = open_split(tmp_path, "train", SCHEMA, "error")
    assert read_back(store, [4, 19, 0]) == [rows[4], rows[19], rows[0]]


def test_rows_left_out_are_counted_again_at_every_start(tmp_path: Path) -> None:
    rows = make_rows(20)
    rows[7]["user"] = 50
    write_split(tmp_path, "train", rows)
    for _ in range(2):  # built, then reused
        store = open_split(tmp_path, "train", SCHEMA, "skip")
        assert store.skipped == {"user is not an id in [0, 50)": 1}
        assert read_back(store, list(range(19))) == rows[:7] + rows[8:]
    with pytest.raises(UserError):
        open_split(tmp_path, "train", SCHEMA, "error")
