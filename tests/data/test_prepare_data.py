"""The command line: exit codes, one line for a mistake, nothing half-written."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from megarec.data.schema import load_schema
from tests.processes import python

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py"


def run(*arguments: str, real: bool = False) -> "subprocess.CompletedProcess[str]":
    return python(TOOL, *arguments, real=real)


def test_success(tmp_path: Path) -> None:
    done = run("synthetic", "--output", str(tmp_path / "out"), "--examples", "100", "--numeric", "0", real=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "80 train, 10 valid, 10 test examples; 6 categorical and 0 numeric features" in done.stdout
    assert load_schema(tmp_path / "out").rows["train"] == 80


def test_synthetic_data_with_the_features_of_a_schema(tmp_path: Path) -> None:
    assert run("synthetic", "--output", str(tmp_path / "a"), "--examples", "20").returncode == 0
    like = ["--schema", str(tmp_path / "a" / "schema.json"), "--output", str(tmp_path / "b"), "--examples", "50"]
    done = run("synthetic", *like, "--max-rows", "7")
    assert (done.returncode, done.stderr) == (0, "")
    assert {f.rows for f in load_schema(tmp_path / "b").categorical} == {7}
    done = run("synthetic", *like, "--single", "3")
    assert (done.returncode, done.stderr) == (
        2,
        "error: --schema and --single both say what the features are; keep one of them\n",
    )
    done = run("synthetic", "--output", str(tmp_path / "c"), "--max-rows", "7")
    assert done.returncode == 2 and "--max-rows caps the tables of --schema" in done.stderr


def test_planted_interactions(tmp_path: Path) -> None:
    order = ["synthetic", "--output", str(tmp_path / "out"), "--order", "3", "--examples", "100"]
    done = run(*order, "--single", "5", "--rows", "4", "--groups", "2")
    assert (done.returncode, done.stderr) == (0, "") and "interactions of orders 1 to 3" in done.stdout
    schema = load_schema(tmp_path / "out")
    assert [f.rows for f in schema.categorical] == [4] * 5 and set(schema.optimum) == {"train", "valid", "test"}
    done = run(*order, "--multi", "1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "leave out --multi" in done.stderr


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = run(
        "table",
        "--schema",
        "none.json",
        *(f"--{s}=x.csv" for s in ("train", "valid", "test")),
        f"--output={tmp_path / 'o'}",
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: none.json: cannot be read (No such file or directory); expected what"), done
    assert list(tmp_path.iterdir()) == []


def test_terms_are_shown(tmp_path: Path) -> None:
    done = run("movielens-100k", "--output", str(tmp_path / "out"), "--wheel", str(tmp_path / "none.whl"))
    assert done.returncode == 2 and "GroupLens" in done.stdout and "no redistribution" in done.stdout


def test_a_stopped_preparation_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "synthetic", "--output", str(tmp_path / "out"), "--examples", "100000000"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 30
    while not any(re.match(r"\.out\.partial-", p.name) for p in tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_a_split_given_in_pieces_is_all_of_them(tmp_path: Path) -> None:
    spec = {"name": "x", "columns": {"id": {"type": "categorical"}, "y": {"type": "label"}}}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    for name in "abcd":
        (tmp_path / f"{name}.csv").write_text(f"id,y\n{name},1\n{name},0\n")
    files = [
        f"--{option}={tmp_path / name}.csv" for option, name in zip(("train", "valid", "test"), "abc", strict=True)
    ]
    command = ["table", f"--schema={tmp_path / 'spec.json'}", *files, f"--output={tmp_path / 'out'}"]
    assert run(*command, f"--train={tmp_path / 'd.csv'}").returncode == 0
    assert load_schema(tmp_path / "out").rows["train"] == 4
    done = run(*command, f"--output={tmp_path / 'other'}")
    assert done.returncode == 2 and done.stderr.endswith(
        "error: --output is given twice; the last would win: keep one\n"
    )
    assert not (tmp_path / "other").exists()
