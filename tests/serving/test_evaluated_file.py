"""`megarec evaluate` of an export from a file of labelled raw rows: the figures of the same rows, prepared."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarec.commands import evaluate
from tests.serving.test_bundle import with_manifest
from tests.serving.trained_runs import OF_TABLE, raw_rows

pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def exported(trained: Callable[[str], Path], columns: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megarec.serving.export.bundle import export_bundle

    path = tmp_path_factory.mktemp("exported") / "out"
    export_bundle(trained(OF_TABLE), path, columns)
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words)])
        code = 0
        try:
            evaluate.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return run


def test_a_file_has_the_figures_of_the_prepared_rows(call: Call, exported: Path, columns: Path, tmp_path: Path) -> None:
    options = ["--json", "--bootstrap", "0", "--k", "3"]
    prepared = json.loads(call("--run", exported, "--data", columns, "--group", "text", *options)[1])
    pq.write_table(pa.Table.from_pylist(raw_rows(columns)), tmp_path / "day.parquet")
    for file in (columns.parent / "test.csv", tmp_path / "day.parquet"):
        code, out, err = call("--run", exported, "--data", file, *options)
        assert code == 0, err
        found = json.loads(out)
        assert {name: found[name] for name in ("auc", "logloss", "ne", "calibration", "examples")} == pytest.approx(
            {name: prepared[name] for name in ("auc", "logloss", "ne", "calibration", "examples")}, abs=1e-6
        )
    page, table = tmp_path / "page.html", tmp_path / "predictions.parquet"
    words = ["--group", "text", "--slice", "height", "hashed", "--html", page, "--predictions", table]
    found = json.loads(call("--run", exported, "--data", file, *words, "--compare", exported, "--json")[1])
    assert len(found["slices"][0]["values"]) == 11, "text of numbers is numbers: tenths, and those that are missing"
    assert found["gauc"]["column"] == "text"
    assert found["compared"]["metrics"]["auc"]["p_value"] == 1
    assert pq.read_table(table).column_names == ["label", "logit", "prediction", "group"]
    assert len(pq.read_table(table)) == len(raw_rows(columns)) and "day.parquet" in page.read_text()
    printed = call("--run", exported, "--data", file, "--bootstrap", "0")[1]
    assert printed.startswith(f"{exported} on {file}: {found['examples']} examples")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        lines = csv.DictWriter(file, list(rows[0]))
        lines.writeheader()
        lines.writerows(rows)
    return path


def test_a_bad_row_is_an_error_or_is_left_out_as_the_run_does(
    call: Call, exported: Path, columns: Path, tmp_path: Path
) -> None:
    rows = raw_rows(columns)
    rows[3], rows[7] = rows[3] | {"hex": "zz"}, rows[7] | {"label": "2"}
    file = write(tmp_path / "day.csv", rows)
    code, out, err = call("--run", exported, "--data", file)
    assert (code, out, err.count("\n")) == (2, "", 1) and f"{file}: row 3 (from 0): hex='zz', expected" in err
    run = json.loads((exported / "run.json").read_text())
    run["config"]["data"]["bad_rows"] = "skip"
    text = json.dumps(run)
    good = (exported / "manifest.json").read_bytes(), (exported / "run.json").read_bytes()
    try:
        (exported / "run.json").write_text(text)
        with_manifest(exported, lambda manifest: edit(manifest, exported / "run.json"))
        code, out, err = call("--run", exported, "--data", file, "--json")
    finally:
        (exported / "manifest.json").write_bytes(good[0])
        (exported / "run.json").write_bytes(good[1])
    assert code == 0 and json.loads(out)["examples"] == len(rows) - 2
    assert "label is not 0 or 1': 1" in err and "hex='zz'" in err


def edit(manifest: dict[str, Any], path: Path) -> None:
    """The manifest of an export in which a file was changed."""
    from megarec.serving.scorer.bundle import checksum

    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": checksum(path)}


def test_mistakes_are_one_line(
    call: Call, exported: Path, columns: Path, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    file, rows = columns.parent / "test.csv", raw_rows(columns)
    without = write(tmp_path / "without.csv", [{n: v for n, v in row.items() if n != "label"} for row in rows])
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "rows.xls").write_text("x")
    for words, message in (
        (["--run", trained(OF_TABLE), "--data", file], "only an export scores raw rows"),
        (["--run", exported, "--data", without], "there is no column 'label', the label"),
        (["--run", exported, "--data", file, "--group", "txt"], "there is no column 'txt'; did you mean 'text'?"),
        (["--run", exported, "--data", file, "--calibrate"], "a file has no split valid"),
        (["--run", exported, "--data", tmp_path / "empty.csv"], "has no row that can be scored"),
        (["--run", exported, "--data", tmp_path / "rows.xls"], "expected a name that ends in"),
    ):
        code, out, err = call(*words)
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err
