from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarec.data import writing
from megarec.data.schema import Schema, save_schema
from megarec.data.writing import SplitWriter, write_dataset
from megarec.errors import UserError
from tests.data.prepared import SCHEMA


def write_named(name: str) -> Callable[[Path], Schema]:
    def write(directory: Path) -> Schema:
        schema = SCHEMA.model_copy(update={"name": name})
        (directory / f"{name}.txt").write_text(name)
        save_schema(schema, directory)
        return schema

    return write


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_directory(tmp_path: Path, exists: bool) -> None:
    output = tmp_path / "some" / "where"
    if exists:
        output.mkdir(parents=True)
    assert write_dataset(output, write_named("a")).name == "a"
    assert names(output) == ["a.txt", "schema.json"] and names(output.parent) == ["where"]


def test_a_data_set_of_ours_is_replaced_as_a_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_dataset(output, write_named("a"))
    write_dataset(output, write_named("b"))
    assert names(output) == ["b.txt", "schema.json"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(directory: Path) -> Schema:
        (directory / "half").write_text("written")
        raise error

    output = tmp_path / "out"
    with pytest.raises(error):
        write_dataset(output, fail)
    assert names(tmp_path) == []
    write_dataset(output, write_named("a"))
    with pytest.raises(error):
        write_dataset(output, fail)
    assert names(output) == ["a.txt", "schema.json"] and names(tmp_path) == ["out"]


def test_a_failed_swap_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    write_dataset(output, write_named("a"))
    rename = Path.rename

    def fails_for_the_new(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(UserError, match=r"out: cannot be written \(no\)"):
        write_dataset(output, write_named("b"))
    assert names(output) == ["a.txt", "schema.json"] and names(tmp_path) == ["out"]


def test_anything_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(UserError, match="thesis: not empty and not a prepared data set; choose another"):
        write_dataset(tmp_path / "thesis", write_named("a"))
    assert names(tmp_path / "thesis") == ["chapter.tex"]
    with pytest.raises(UserError, match=r"chapter\.tex: is a file"):
        write_dataset(tmp_path / "thesis" / "chapter.tex", write_named("a"))
    with pytest.raises(UserError, match=r"cannot be written \(File exists\)"):
        write_dataset(tmp_path / "thesis" / "chapter.tex" / "deeper", write_named("a"))


def test_shards_are_cut_at_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "ROWS_PER_SHARD", 10)
    with SplitWriter(tmp_path / "train") as writer:
        for start, stop in ((0, 7), (7, 7), (7, 31)):
            writer.write(pa.table({"x": list(range(start, stop))}, schema=pa.schema({"x": pa.int64()})))
    assert writer.rows == 31
    shards = [pq.read_table(path)["x"].to_pylist() for path in sorted((tmp_path / "train").iterdir())]
    assert [len(shard) for shard in shards] == [10, 10, 10, 1]
    assert [x for shard in shards for x in shard] == list(range(31))
