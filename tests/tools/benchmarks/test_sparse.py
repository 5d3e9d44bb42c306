"""The benchmarks of the sparse side, small: the contestants do the same work and the report has its keys."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megarec.errors import UserError
from tools.benchmarks import flat, regularisation, tables
from tools.benchmarks.workload import equal_tables, random_batch

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.SIZES, "cpu", tables.Size(3, 50, 8, 16))
    monkeypatch.setattr(tables, "REPETITIONS", 3)


@pytest.mark.usefixtures("small")
def test_tables_reports_the_ratios_of_its_medians() -> None:
    result = tables.run()
    step = {row["name"]: row["step_ms"] for row in result["rows"]}
    assert result["name"] == "tables"
    assert result["ratios"] == {
        "over_fbgemm": pytest.approx(step["sparse side"] / step["bare fbgemm"]),
        "torch_over_fbgemm": pytest.approx(step["sparse side in torch"] / step["bare fbgemm"]),
    }


def test_regularisation_steps_every_table_in_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(regularisation.SIZES, "cpu", regularisation.Size(50, 8, 16))
    monkeypatch.setattr(regularisation, "REPETITIONS", 1)
    result = regularisation.run()
    step = {row["name"]: row["step_ms"] for row in result["rows"]}
    held = {row["name"]: row["bytes"] for row in result["rows"]}
    assert set(step) == {*regularisation.OURS, "plain torch, all rows", "lazy decay, saved"}
    assert held["lazy decay"] == held["looked-up rows"] + 8 * 50
    ratio = step["all rows, L2 in the gradient"] / step["plain torch, all rows"]
    assert result["ratios"]["all_rows_over_plain_torch"] == pytest.approx(ratio)


def test_bare_fbgemm_looks_up_the_same_features() -> None:
    batch = random_batch(equal_tables(3, 50, 8), 16, seed=0)
    out = tables._bare_fbgemm(tables.Size(3, 50, 8, 16), [batch], torch.device("cpu"))(0)
    assert out.shape == (16, 24)
    ids = batch.ids["feature_1"].values
    same_embedding = (out[:, None, 8:16] == out[None, :, 8:16]).all(dim=2)
    assert torch.equal(same_embedding, ids[:, None] == ids[None, :]), "examples with the same id, and only those"


@pytest.mark.skipif(importlib.util.find_spec("torchrec") is not None, reason="TorchRec is installed here")
def test_flat_without_torchrec_names_the_command_that_installs_it() -> None:
    with pytest.raises(UserError, match=r"bash tools/bench_env\.sh"):
        flat.run()


def test_an_unknown_benchmark_is_an_error_of_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "tools/bench.py", "tabels"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no benchmark is called 'tabels'; did you mean 'tables'?\n"


def test_json_is_one_object_alone_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("bench_tool", ROOT / "tools" / "bench.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    result = {"name": "tables", "rows": [{"a": 1.5}], "ratios": {"over_fbgemm": 1.0}}
    monkeypatch.setattr(tables, "run", lambda: result)
    monkeypatch.setattr(sys, "argv", ["bench.py", "tables", "--json"])
    tool.main()
    assert json.loads(capsys.readouterr().out) == result
