"""What Hugging Face datasets opens, without a network: directories of files, and what save_to_disk wrote."""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarec.commands.prepare_data import main
from megarec.data.preparation import hub
from megarec.data.schema import load_schema
from tests.data.preparation.test_formats import SMALL
from tests.data.preparation.test_preparation import content

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "BATCH_ROWS", 70)
    for cached in (hub._saved, hub._builder, hub._stream, hub._files):
        cached.cache_clear()


def rows(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {
            "a": f"u{i % 7}",
            "l": ["p", f"q{i % 5}"] if i % 4 else None,
            "x": i / 2 if i % 9 else None,
            "y": i * i % 3 % 2,
        }
        for i in range(first, first + count)
    ]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A split of three files, and two of one."""
    for split, cuts in (("train", (0, 100, 300, 350)), ("validation", (350, 400)), ("test", (400, 430))):
        (tmp_path / "shop" / split).mkdir(parents=True)
        for start, end in itertools.pairwise(cuts):
            pq.write_table(
                pa.Table.from_pylist(rows(start, end - start)), tmp_path / "shop" / split / f"{start:03}.parquet"
            )
    (tmp_path / "spec.json").write_text(json.dumps({"name": "n", "columns": SMALL}))
    return tmp_path / "shop"


def run(monkeypatch: pytest.MonkeyPatch, capsys: Capture, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def test_the_same_as_its_files(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Directory and save_to_disk, one worker and two, give the bytes that `table` makes of the files."""
    schema = f"--schema={tmp_path / 'spec.json'}"
    files = [f"--{s}={directory / n}" for s, n in (("train", "train"), ("valid", "validation"), ("test", "test"))]
    assert run(monkeypatch, capsys, "table", schema, *files, f"--output={tmp_path / 'table'}")[0] == 0
    expected = content(tmp_path / "table")
    datasets.disable_progress_bars()
    datasets.load_dataset(str(directory), cache_dir=str(tmp_path / "cache")).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setattr("megarec.data.preparation.table_reader.UNIT_BYTES", 1000)
    for number, (name, words) in enumerate(
        (
            (directory, ["--workers=1"]),
            (directory, ["--workers=2", "--train=train", "--valid=validation", "--test=test"]),
            (tmp_path / "saved", []),
        )
    ):
        out = tmp_path / f"out-{number}"
        code, output, error = run(monkeypatch, capsys, "hf", name, schema, *words, f"--output={out}")
        assert (code, error) == (0, "") and "350 train, 50 valid, 30 test" in output
        assert content(out) == expected
    like = [f"--like={tmp_path / 'table'}", "--test=test", f"--output={tmp_path / 'like'}"]
    assert run(monkeypatch, capsys, "hf", directory, *like)[0] == 0
    assert pq.read_table(tmp_path / "like" / "test").equals(pq.read_table(tmp_path / "table" / "test"))


def test_one_split_is_split_by_chance(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    words = ["--data", "train", "test", "--fractions", "0.5", "0.25", "0.25", f"--output={tmp_path / 'out'}"]
    assert run(monkeypatch, capsys, "hf", directory, f"--schema={tmp_path / 'spec.json'}", *words)[0] == 0
    assert sum(load_schema(tmp_path / "out").rows.values()) == 380
    code, output, _ = run(monkeypatch, capsys, "hf", directory, "--infer=train", f"--schema={tmp_path / 'first.json'}")
    assert code == 0 and "a first spec, from the first 350 rows" in output
    assert json.loads((tmp_path / "first.json").read_text())["columns"]["l"] == {
        "type": "multi_valued",
        "dtype": "string",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--train=trian", "--valid=test", "--test=test"],
            "--train trian: .*shop has no such split; did you mean 'train'",
        ),
        (["--data", "train", "train"], "--data names train twice: its rows would count twice"),
    ],
)
def test_mistakes(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, words: list[str], message: str
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    name = [directory, f"--schema={tmp_path / 'spec.json'}", f"--output={tmp_path / 'out'}"]
    code, _, error = run(monkeypatch, capsys, "hf", *name, *words)
    assert code == 2 and error.count("\n") == 1 and re.search(message, error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_cannot_be_read(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    schema = [f"--schema={tmp_path / 'spec.json'}", f"--output={tmp_path / 'out'}"]
    code, _, error = run(monkeypatch, capsys, "hf", tmp_path / "none", *schema)
    assert code == 2 and error.count("\n") == 1 and "none: datasets cannot read it: " in error
    table = pa.Table.from_pylist([{"a": "u", "l": ["p"], "x": 1.5, "y": 7.0}])
    pq.write_table(table, directory / "train" / "300.parquet")
    code, _, error = run(monkeypatch, capsys, "hf", directory, *schema)
    assert code == 2 and error == f"error: {directory}:train: row 300 (from 0): y=7, expected 0 or 1\n"
    (directory / "train" / "300.parquet").write_bytes(b"PAR1")
    code, _, error = run(monkeypatch, capsys, "hf", directory, *schema)
    assert code == 2 and error.count("\n") == 1 and "train: datasets cannot read it: " in error
    (directory / "test" / "400.parquet").unlink()
    (directory / "test").rmdir()
    for cached in (hub._builder, hub._stream, hub._files):
        cached.cache_clear()
    code, _, error = run(monkeypatch, capsys, "hf", directory, *schema)
    assert code == 2 and "has no split 'test', only: train, validation; choose them by --train" in error
