"""Tables of runs: what is read, and what is refused with its row."""

import os
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from megarec.errors import UserError
from megarec.scaling.points import Run, family_of, read_points

RUNS = "model,train_gflop_per_example,parameters,seed,logloss,ne\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_and_parquet_give_the_same_points(tmp_path: Path) -> None:
    text = RUNS + "wukong-2gflop,2,300,1,0.5,0.9\nwukong-1gflop,1,200,1,0.6,0.95\ndlrm,1,100,1,,\n"
    columns = {
        "model": ["wukong-2gflop", "wukong-1gflop", "dlrm"],
        "train_gflop_per_example": [2.0, 1.0, 1.0],
        "parameters": [300, 200, 100],
        "seed": [1, 1, 1],
        "logloss": [0.5, 0.6, None],
        "ne": [0.9, 0.95, None],
    }
    parquet.write_table(pa.table(columns), tmp_path / "runs.parquet")
    for path in (write(tmp_path / "runs.csv", text), tmp_path / "runs.parquet"):
        points = read_points(path)
        assert points.families == {"wukong": (Run(1, 0.6), Run(2, 0.5))}
        assert points.unmeasured == {"dlrm": (1.0,)}
        assert (points.quality, points.axis) == ("logloss", "gflop")
        assert read_points(path, "parameters", "ne").families == {"wukong": (Run(200, 0.95), Run(300, 0.9))}


@pytest.mark.parametrize(
    ("model", "family"),
    [("wukong", "wukong"), ("dcnv2", "dcnv2"), ("dcnv2-43.88gflop", "dcnv2"), ("autoint+_8x96", "autoint+")],
)
def test_a_family_is_the_name_up_to_its_size(model: str, family: str) -> None:
    assert family_of(model) == family


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("dlrm,fast,1,1,0.5,0.9", "row 2: train_gflop_per_example is 'fast', not a number"),
        ("dlrm,-3,1,1,0.5,0.9", "row 2: train_gflop_per_example is -3, but must be above 0"),
        ("dlrm,,1,1,0.5,0.9", "row 2: train_gflop_per_example is '', not a number"),
        ("dlrm,3,1,1,good,0.9", "row 2: logloss is 'good', not a number"),
        ("dlrm,3,1,1,nan,0.9", "row 2: logloss is 'nan'; leave it empty"),
        ("dlrm,3,1,1,-0.5,0.9", "row 2: logloss is -0.5, but must be above 0"),
        (",3,1,1,0.5,0.9", "row 2: model is empty"),
        ("dlrm,3,1,1,0.5", "row 2: not as many values as the header's 6 columns"),
        ("dlrm,3,1,1,0.5,0.9,7", "row 2: not as many values as the header's 6 columns"),
        ("wukong,1,1,1,0.5,0.9", "row 2: model, size and seed are those of row 1"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = write(tmp_path / "runs.csv", f"{RUNS}wukong,1,1,1,0.5,0.9\n{row}\n")
    with pytest.raises(UserError) as raised:
        read_points(path)
    assert str(raised.value).startswith(f"{path}, {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column relative_logloss_percent or logloss or ne"),
        ("model,gflop,logloss\nwukong,1,0.5\n", "no column train_gflop_per_example; the columns are model, gflop"),
        ("model,train_gflop_per_example,auc\nwukong,1,0.5\n", "no column relative_logloss_percent or logloss or ne"),
        ("model,train_gflop_per_example,logloss\nwukong,1,\n", "no row has a logloss"),
        ("model,train_gflop_per_example,relative_logloss_percent\nwukong,1,-100\n", "row 1: relative_logloss_percent"),
    ],
)
def test_an_unusable_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_points(write(tmp_path / "runs.csv", text))


def test_files_that_are_not_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read_points(write(tmp_path / "runs.parquet", "model"))
    with pytest.raises(UserError, match=r"absent.csv: cannot be read \(No such file or directory\); expected a CSV"):
        read_points(tmp_path / "absent.csv")
    for name, link in (("a.csv", "/dev/zero"), ("b.csv", tmp_path)):
        (tmp_path / name).symlink_to(link)
        with pytest.raises(
            UserError, match=r"cannot be read \(is a (device|directory)\); expected a CSV file of points"
        ):
            read_points(tmp_path / name)
    for name in ("fifo.csv", "fifo.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=r"fifo.\w+: cannot be read .*is a FIFO"):
            read_points(tmp_path / name)
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as CSV"):
        read_points(tmp_path / "bytes.csv")


def test_runs_at_one_size_need_different_seeds_only_where_seeds_are_given(tmp_path: Path) -> None:
    text = "model,train_gflop_per_example,logloss\nwukong,1,0.5\nwukong,1,0.6\n"
    assert read_points(write(tmp_path / "runs.csv", text)).families == {"wukong": (Run(1, 0.5), Run(1, 0.6))}
