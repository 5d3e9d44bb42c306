"""The command line: exit codes, one line for a mistake, nothing half-written."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megarec.data.schema import load_schema
from megarec.data.store import open_split
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


NAMES = ["../../../victim", "/etc/passwd", "ts/weekday", "..", "", "%2F", "x" * 300, "päck", "a\\b", "~"]


def table(path: Path, *words: str, columns: list[str] | None = None, text: str | None = None) -> list[str]:
    columns = columns or ["x"]
    spec = {"name": "n", "columns": {c: {"type": "categorical"} for c in columns} | {"y": {"type": "label"}}}
    (path / "spec.json").write_text(json.dumps(spec))
    (path / "a.csv").write_text(text or ",".join([*columns, "y"]) + "\n" + "1," * len(columns) + "1\n")
    (path / "b.csv").write_text(text or ",".join([*columns, "y"]) + "\n" + "2," * len(columns) + "0\n")
    files = [f"--{split}={path / 'a.csv'}" for split in ("train", "valid", "test")]
    return ["table", f"--schema={path / 'spec.json'}", *files, *words]


def test_a_name_is_not_a_path(tmp_path: Path) -> None:
    work = tmp_path / "1" / "2" / "3" / "4"
    work.mkdir(parents=True)
    done = run(*table(work, "--output", str(work / "out"), columns=NAMES))
    assert done.returncode == 0, done.stderr
    files = {
        path.relative_to(work / "out").parts[0]
        for path in tmp_path.rglob("*")
        if path.is_file() and "out" in path.parts
    }
    assert files == {"schema.json", "spec.json", "train", "valid", "test", "vocabulary"}
    assert sorted(p.name for p in tmp_path.rglob("*.parquet") if "out" not in p.parts) == []
    assert len(list((work / "out" / "vocabulary").iterdir())) == len(NAMES)
    schema = load_schema(work / "out")
    assert [f.name for f in schema.categorical] == NAMES
    _, ids, _ = open_split(work / "out", "test", schema, "error").gather(np.array([0]))
    assert list(ids) == NAMES
    done = run(
        "table",
        f"--like={work / 'out'}",
        f"--test={work / 'b.csv'}",
        "--output",
        str(work / "tomorrow"),
    )
    assert done.returncode == 0 and done.stderr.count("are unknown") == len(NAMES)


def test_no_argument_vanishes(tmp_path: Path) -> None:
    words = table(tmp_path, f"--train={tmp_path / 'b.csv'}", "--output", str(tmp_path / "out"))
    assert run(*words).returncode == 0
    assert load_schema(tmp_path / "out").rows == {"train": 2, "valid": 1, "test": 1}
    done = run(*words, f"--output={tmp_path / 'other'}")
    assert done.returncode == 2 and done.stderr.endswith(
        "error: --output is given twice; the last would win: keep one\n"
    )
    done = run("synthetic", "--examples=20", "--examples=30", "--output", str(tmp_path / "s"))
    assert done.returncode == 2 and "error: --examples is given twice; the last would win: keep one\n" in done.stderr
    done = run("table", *words[1:2], *words[2:4], "--output", str(tmp_path / "t"))
    assert (done.returncode, done.stderr.split(";")[0]) == (2, "error: --test is missing")


def test_an_output_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):  # new, then replaced
        assert run(*table(tmp_path, "--output", str(tmp_path / "link"))).returncode == 0
        assert (tmp_path / "link").is_symlink() and load_schema(tmp_path / "real").rows["train"] == 1
    (tmp_path / "lost").symlink_to("nowhere")
    done = run(*table(tmp_path, "--output", str(tmp_path / "lost")))
    assert done.returncode == 2 and "is a link to nowhere, which is not there" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "b.csv", "link", "lost", "real", "spec.json"]


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(*table(tmp_path, "--output=~/out")).returncode == 0
    assert load_schema(tmp_path / "out").rows["train"] == 1


def test_unknown_values_are_shown(tmp_path: Path) -> None:
    words = table(tmp_path, "--output", str(tmp_path / "out"))
    words[4] = f"--test={tmp_path / 'b.csv'}"
    done = run(*words)
    assert done.returncode == 0
    assert re.search(r"feature +train +valid +test\n +x +0\.00% +0\.00% +100\.00%\n", done.stdout)
    assert done.stderr.startswith("warning: 100.0% of the values of 'x' in test are unknown")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["file:data", "s3:data", "mock:data"])
def test_a_name_is_not_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Pyarrow takes them for addresses: file:/tmp/data wrote to /tmp."""
    monkeypatch.chdir(tmp_path)
    done = run("synthetic", "--output", name, "--examples", "20")
    assert (done.returncode, done.stderr) == (0, "") and load_schema(tmp_path / name).rows["train"] == 16
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    done = run("synthetic", "--output", str(tmp_path / "\udcff"), "--examples", "20")
    assert done.returncode == 2 and "is not UTF-8" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_counts_once_in_a_split(tmp_path: Path) -> None:
    words = table(tmp_path, "--output", str(tmp_path / "out"))
    (tmp_path / "link.csv").symlink_to(tmp_path / "a.csv")
    done = run(*words, f"--train={tmp_path / 'link.csv'}")
    assert done.returncode == 2 and "a.csv): its rows would count twice; name it once" in done.stderr
    assert not (tmp_path / "out").exists()
