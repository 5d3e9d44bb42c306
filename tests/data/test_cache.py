import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from megarec.data.cache import BUILT_FILE, ROWS_FILE, ensure_cache
from megarec.data.records import RECORD, RecordLayout
from megarec.data.store import open_split
from megarec.errors import UserError
from tests.data.prepared import SCHEMA, make_rows, write_prepared, write_split

ROOT = Path(__file__).resolve().parents[2]
# A builder that notes that it builds, and, if asked, stops half-way for good.
BUILDER = """
import sys, time
from pathlib import Path
from megarec.data import cache
from megarec.data.records import RecordLayout
from megarec.data.schema import load_schema
directory, hang = Path(sys.argv[1]), sys.argv[2] == "hang"
build, pack = cache._build, RecordLayout.pack
def noted(*args):
    with (directory / "builds").open("a") as file:
        file.write("built\\n")
    return build(*args)
def slowly(*args):
    print("building", flush=True)
    time.sleep(1000 if hang else 0.5)
    return pack(*args)
cache._build, RecordLayout.pack = noted, slowly
print(cache.ensure_cache(directory, "train", load_schema(directory), "error")[0], flush=True)
"""


def start_builder(directory: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(directory), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_many_processes_build_once(tmp_path: Path) -> None:
    write_prepared(tmp_path)
    builders = [start_builder(tmp_path, "finish") for _ in range(3)]
    caches = {builder.communicate(timeout=60)[0].splitlines()[-1] for builder in builders}
    assert len(caches) == 1 and (Path(caches.pop()) / ROWS_FILE).is_file()
    assert (tmp_path / "builds").read_text() == "built\n"


def test_a_killed_builder_blocks_nobody(tmp_path: Path) -> None:
    write_prepared(tmp_path)
    killed = start_builder(tmp_path, "hang")
    assert killed.stdout is not None and killed.stdout.readline() == "building\n"
    waiting = start_builder(tmp_path, "finish")
    assert len(list((tmp_path / ".arrow").glob("*.partial"))) == 1
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    cache = Path(waiting.communicate(timeout=60)[0].splitlines()[-1])
    assert sorted(path.name for path in (tmp_path / ".arrow").iterdir()) == sorted([cache.name, "lock"])
    assert (cache / ROWS_FILE).is_file()


def test_reused_while_nothing_changes(tmp_path: Path) -> None:
    write_split(tmp_path, "train", make_rows(20), shards=2)
    cache, _ = ensure_cache(tmp_path, "train", SCHEMA, "error")
    built = (cache / ROWS_FILE).stat().st_mtime_ns
    assert ensure_cache(tmp_path, "train", SCHEMA, "error")[0] == cache
    assert (cache / ROWS_FILE).stat().st_mtime_ns == built


def test_rebuilt_when_shards_columns_or_policy_change(tmp_path: Path) -> None:
    write_split(tmp_path, "train", make_rows(20), shards=2)
    caches = {ensure_cache(tmp_path, "train", SCHEMA, how)[0] for how in ("error", "skip")}
    caches.add(ensure_cache(tmp_path, "train", SCHEMA.model_copy(update={"numeric": ("age",)}), "error")[0])
    shard = tmp_path / "train" / "001.parquet"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    caches.add(ensure_cache(tmp_path, "train", SCHEMA, "error")[0])
    assert len(caches) == 4


def test_a_failed_build_leaves_no_cache(tmp_path: Path) -> None:
    rows = make_rows(20)
    rows[19]["user"] = 1000
    write_split(tmp_path, "train", rows)
    with pytest.raises(UserError):
        ensure_cache(tmp_path, "train", SCHEMA, "error")
    assert not [path for path in (tmp_path / ".arrow").iterdir() if path.suffix == "" and path.name != "lock"]


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train holds no \*\.parquet shard; prepare the data first"):
        ensure_cache(tmp_path, "train", SCHEMA, "error")


def test_no_rows(tmp_path: Path) -> None:
    write_split(tmp_path, "train", [])
    with pytest.raises(UserError, match="train is empty: its shards have no rows; prepare"):
        ensure_cache(tmp_path, "train", SCHEMA, "error")


def test_no_good_rows(tmp_path: Path) -> None:
    write_split(tmp_path, "train", [row | {"label": 3} for row in make_rows(4)])
    with pytest.raises(UserError, match=r"train is empty: all 4 rows are bad: \{'label is not 0 or 1': 4\}"):
        ensure_cache(tmp_path, "train", SCHEMA, "skip")


def test_a_lost_shard(tmp_path: Path) -> None:
    write_split(tmp_path, "train", make_rows(20), shards=2)
    (tmp_path / "train" / "001.parquet").unlink()
    schema = SCHEMA.model_copy(update={"rows": {"train": 20}})
    with pytest.raises(UserError, match=r"train has 10 rows in 1 shards, but schema.json says rows\.train=20"):
        ensure_cache(tmp_path, "train", schema, "error")


@pytest.mark.parametrize("keep", [0, 5, 700])
def test_a_broken_shard(tmp_path: Path, keep: int) -> None:
    write_split(tmp_path, "train", make_rows(500), shards=2)
    shard = tmp_path / "train" / "001.parquet"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"001\.parquet cannot be read as parquet"):
        ensure_cache(tmp_path, "train", SCHEMA, "error")


def test_damaged_pages(tmp_path: Path) -> None:
    write_split(tmp_path, "train", make_rows(500))
    shard = tmp_path / "train" / "000.parquet"
    data = bytearray(shard.read_bytes())
    data[4:400] = bytes(396)
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"000\.parquet cannot be read as parquet"):
        ensure_cache(tmp_path, "train", SCHEMA, "error")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    write_split(tmp_path, "train", make_rows(5))
    (tmp_path / ".arrow").write_text("in the way")
    with pytest.raises(UserError, match=r"\.arrow/train-\w+ cannot be written \(File exists\)"):
        ensure_cache(tmp_path, "train", SCHEMA, "error")


def test_pooling_needs_no_other_cache(tmp_path: Path) -> None:
    write_split(tmp_path, "train", make_rows(5))
    other = json.loads(SCHEMA.model_dump_json())
    other["categorical"][1]["pooling"] = "mean"
    cache, _ = ensure_cache(tmp_path, "train", SCHEMA, "error")
    assert ensure_cache(tmp_path, "train", SCHEMA.model_validate(other), "error")[0] == cache


def test_a_shard_too_many(tmp_path: Path) -> None:
    """The validation shard copied into train."""
    write_split(tmp_path, "train", make_rows(20), shards=2)
    write_split(tmp_path, "valid", make_rows(5))
    shutil.copy(tmp_path / "valid" / "000.parquet", tmp_path / "train" / "002.parquet")
    schema = SCHEMA.model_copy(update={"rows": {"train": 20, "valid": 5}})
    with pytest.raises(
        UserError, match=r"train has 25 rows in 3 shards, .*rows\.train=20: is a shard there that is not"
    ):
        ensure_cache(tmp_path, "train", schema, "error")


def damage(cache: Path, how: str) -> None:
    rows, built = cache / ROWS_FILE, cache / BUILT_FILE
    data = bytearray(rows.read_bytes())
    if how == "truncated":
        rows.write_bytes(data[:-100])
    elif how == "empty":
        rows.write_bytes(b"")
    elif how == "longer":
        rows.write_bytes(data + b"x")
    elif how == "gone":
        rows.unlink()
    elif how.startswith("bit"):
        data[len(data) * int(how[3:]) // 100] ^= 4
        rows.write_bytes(data)
    elif how == "seven":  # for a label
        with pa.ipc.open_stream(bytes(data)) as stream:
            table = stream.read_all()
        layout = RecordLayout(SCHEMA)
        records = table.column(RECORD).combine_chunks().values.to_numpy().copy().view(np.uint64)
        layout.floats(records.reshape(-1, layout.words))[:, -1] = 7
        column = pa.FixedSizeListArray.from_arrays(pa.array(records.view(np.int32)), 2 * layout.words)
        table = table.set_column(0, table.schema.field(0), column)
        with pa.ipc.new_stream(rows, table.schema) as writer:
            writer.write_table(table)
    elif how == "unbuilt":
        built.unlink()
    elif how == "file":
        shutil.rmtree(cache)
        cache.write_text("in the way")
    else:
        built.write_text({"no json": "{", "list": "[]", "nan": '{"bytes":NaN}', "more": '{"bytes":1,"x":2}'}[how])


HOW = ["truncated", "empty", "longer", "gone", "seven", "unbuilt", "file", "no json", "list", "nan", "more"]


@pytest.mark.parametrize("how", [*HOW, "bit50", "bit90"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_prepared(tmp_path)
    cache, _ = ensure_cache(tmp_path, "train", SCHEMA, "error")
    good = (cache / ROWS_FILE).read_bytes()
    damage(cache, how)
    store = open_split(tmp_path, "train", SCHEMA, "error")
    _, ids, labels = store.gather(np.arange(len(rows)))
    assert labels.tolist() == [row["label"] for row in rows]
    assert ids["item"].values.tolist() == [row["item"] for row in rows]
    assert (cache / ROWS_FILE).read_bytes() == good
    assert capsys.readouterr().err == f"{cache}: damaged, is rebuilt\n"
    assert sorted(path.name for path in cache.parent.iterdir()) == sorted([cache.name, "lock"])
    open_split(tmp_path, "train", SCHEMA, "error")
    assert capsys.readouterr().err == ""


def test_no_flipped_bit_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of rows, places and types of columns, and padding: right rows, from the cache or from a rebuilt one."""
    rows = write_prepared(tmp_path)
    cache, _ = ensure_cache(tmp_path, "train", SCHEMA, "error")
    good, rebuilt = (cache / ROWS_FILE).read_bytes(), 0
    for place in range(0, 8 * len(good), 8 * len(good) // 60):
        flipped = bytearray(good)
        flipped[place // 8] ^= 1 << place % 8
        (cache / ROWS_FILE).write_bytes(flipped)
        numeric, ids, labels = open_split(tmp_path, "train", SCHEMA, "error").gather(np.arange(len(rows)))
        assert labels.tolist() == [row["label"] for row in rows], place
        assert numeric.tolist() == [[row["price"], row["age"]] for row in rows], place
        assert ids["item"].values.tolist() == [row["item"] for row in rows], place
        assert ids["history"].values.tolist() == [item for row in rows for item in row["history"]], place
        rebuilt += capsys.readouterr().err == f"{cache}: damaged, is rebuilt\n"
    assert rebuilt > 20, "the rest of the file is padding, and what describes no column"


def test_damage_is_seen_when_the_row_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks have the cache open; the first to read the row rebuilds it, the other reads the result."""
    rows = write_prepared(tmp_path)
    lists = np.array([*rows[39]["tags"], *rows[39]["history"]], np.int32).tobytes()
    places = {"id": 0, "length": 8, "number": 16, "label": 24, "span": 32, "hash": 48, "checksum": 56}
    for what in (*places, "lists"):
        stores = [open_split(tmp_path, "train", SCHEMA, "error") for _ in range(2)]
        cache, _ = ensure_cache(tmp_path, "train", SCHEMA, "error")
        record = stores[0]._file.records(stores[0]._file.find(np.array([39]))[1]).tobytes()
        with (cache / ROWS_FILE).open("r+b") as file:  # in place: in the memory of both
            data = file.read()
            place = data.index(lists) if what == "lists" else data.index(record) + places[what]
            file.seek(place)
            file.write(b"\1\2\3\4")  # in the last row; an id far outside its table
        for store in stores:
            assert store.gather(np.arange(10))[2].tolist() == [row["label"] for row in rows[:10]]
        assert capsys.readouterr().err == ""
        for store in stores:
            numeric, ids, labels = store.gather(np.arange(39, 20, -1))
            assert labels.tolist() == [row["label"] for row in rows[:20:-1]]
            assert numeric.tolist() == [[row["price"], row["age"]] for row in rows[:20:-1]]
            assert ids["user"].values.tolist() == [row["user"] for row in rows[:20:-1]]
            assert ids["history"].values.tolist() == [item for row in rows[:20:-1] for item in row["history"]]
        assert capsys.readouterr().err == f"{cache}: damaged, is rebuilt\n"


def test_damage_that_comes_back_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prepared(tmp_path)
    monkeypatch.setattr("megarec.data.records.hashes", lambda rows: np.zeros(len(rows), np.uint64))
    store = open_split(tmp_path, "train", SCHEMA, "error")
    with pytest.raises(UserError, match=r"rows\.arrow is damaged just after it was built: check this machine's disk"):
        store.gather(np.arange(3))


@pytest.mark.parametrize("names", [(ROWS_FILE, BUILT_FILE), (ROWS_FILE,), (BUILT_FILE,)])
def test_the_cache_of_another_split(tmp_path: Path, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """valid's cache copied over train's: as large, whole in itself, other rows."""
    rows = write_prepared(tmp_path)
    write_split(tmp_path, "valid", [row | {"label": 1 - row["label"]} for row in rows])
    train, valid = (ensure_cache(tmp_path, split, SCHEMA, "error")[0] for split in ("train", "valid"))  # type: ignore[arg-type]
    for name in names:
        shutil.copy(valid / name, train / name)
    labels = open_split(tmp_path, "train", SCHEMA, "error").gather(np.arange(len(rows)))[2]
    assert labels.tolist() == [row["label"] for row in rows]
    assert capsys.readouterr().err == f"{train}: damaged, is rebuilt\n"


def test_data_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user other than root meets it: nothing can be made in the data's directory."""
    one, two, elsewhere = tmp_path / "one", tmp_path / "two", tmp_path / "caches" / "here"
    for path in (one, two):
        write_prepared(path)
        (path / ".arrow").symlink_to("/proc/no/such/place")
    with pytest.raises(UserError, match=r"cannot be written .*set data\.cache \(evaluate: --cache\) to a directory"):
        open_split(one, "train", SCHEMA, "error")
    for path in (one, two):
        shard = path / "train" / "000.parquet"
        os.utime(shard, ns=(0, 0))  # only the path distinguishes the two
        assert len(open_split(path, "train", SCHEMA, "error", elsewhere)) == 40
    assert len([path for path in elsewhere.iterdir() if path.is_dir()]) == 2
