"""tools/plan.py: design.md's keys, a table and one sentence, and mistakes as one line."""

import json
from pathlib import Path

import pytest

from megarec.config.load import load_config
from tests.processes import python

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ["--config", "ds_configs/dlrm-criteo-terabyte.json", "--set", "embedding.placement=auto"]
JOB = [*CONFIG, "--hardware", "h100", "--hosts", "1"]
ZERO = "deepspeed.zero_optimization"
KEYS = {"fits", "memory_bytes", "step_ms", "examples_per_second", "mfu", "bytes_per_link", "assumptions"}


def test_keys_and_table() -> None:
    command = ["tools/plan.py", *CONFIG, "--hardware", "h100", "--hosts", "8", "--ranks-per-host", "8"]
    shown = python(*command, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert "PREDICTED, NOT MEASURED: 8 hosts x 8 H100, 2,048 examples a rank" in shown.stdout
    found = json.loads(python(*command, "--json", cwd=ROOT).stdout)
    assert set(found) >= KEYS
    assert found["step_ms"]["total"] == pytest.approx(sum(v for k, v in found["step_ms"].items() if k != "total"))
    assert found["examples_per_second"] == pytest.approx(131_072 / found["step_ms"]["total"] * 1e3)
    assert found["fits"] is True and found["memory_bytes"]["total"] < found["memory_bytes"]["available"] == 80e9
    rows = found["towers"]["rows"]
    assert [row["variant"] for row in rows][:3] == ["flat", "SPTT alone", "compression 2"]
    assert rows[0]["ratio_to_flat"] == 1 and found["towers"]["sentence"] in " ".join(shown.stdout.split())


def test_choose_writes_a_run_a_trace_and_a_page(tmp_path: Path) -> None:
    out, trace, page = tmp_path / "run.json", tmp_path / "step.json", tmp_path / "plan.html"
    command = ["tools/plan.py", *CONFIG, "--hardware", "h100", "--hosts", "1", "--ranks-per-host", "4", "--choose"]
    files = ["--out", out, "--trace", trace, "--html", page]
    shown = python(*command, *files, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert "the choice with one setting changed" in shown.stdout and "deepspeed.zero_optimization" in shown.stdout
    found = json.loads(python(*command, "--json", cwd=ROOT).stdout)
    assert set(found) >= KEYS and found["fits"]
    assert found["choice"]["chosen"]["step_ms"]["total"] == pytest.approx(found["step_ms"]["total"])
    assert found["choice"]["given"]["examples_per_second"] <= found["examples_per_second"]
    config = load_config(out)
    assert config.deepspeed["zero_optimization"] == {"stage": 0, **found["choice"]["settings"][ZERO]}
    again = json.loads(python("tools/plan.py", "--config", out, *command[5:-1], "--json", cwd=ROOT).stdout)
    assert again["step_ms"] == found["step_ms"] and again["memory_bytes"] == found["memory_bytes"]
    assert json.loads(trace.read_text())["otherData"]["step_ms"] == pytest.approx(found["step_ms"]["total"])
    assert "Timeline of a rank" in page.read_text()


def test_a_run_that_does_not_fit_is_planned_and_refused() -> None:
    command = [*CONFIG, "--hardware", "a40", "--hosts", "1", "--ranks-per-host", "2", "--json"]
    shown = python("tools/plan.py", *command, cwd=ROOT)
    assert shown.returncode == 2
    found = json.loads(shown.stdout)
    memory = found["memory_bytes"]
    missing = (memory["total"] - memory["available"]) / 1e9
    assert found["fits"] is False and missing > 0
    (line,) = shown.stderr.splitlines()
    assert f"the run does not fit: it needs {memory['total'] / 1e9:,.1f} GB on its largest rank (tables " in line
    assert f", {missing:,.1f} more than the 48.0 of A40; --choose looks for settings that fit" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*CONFIG, "--hardware", "h10", "--hosts", "2"], "--hardware h10: no such machine is known here; did you mean"),
        (
            [*CONFIG, "--hardware", "h100", "--hosts", "2", "--ranks-per-host", "16"],
            "--ranks-per-host 16: a host of H100 has 8",
        ),
        ([*CONFIG, "--hardware", "h100", "--hosts", "0"], "--hosts 0: expected at least 1"),
        ([*JOB, "--out", "o.json"], "--out belongs to --choose"),
        ([*JOB, "--choose", "--allow", "mesages"], "--allow mesages: did you mean 'messages'"),
        ([*JOB, "--trace", "missing/t.json"], "--trace missing/t.json: missing is not a directory"),
        ([*JOB, "--choose", "--set", "model.dim=100000"], "nothing fits: of "),
        ([*CONFIG, "--hosts", "2"], "give --hardware (or --measure FILE alone)"),
        (["--measure", "m.json", "--hosts", "2", "--json"], "--measure FILE stands alone: leave --hosts, --json out"),
        ([*CONFIG, "--hardware", "h100", "--hosts", "3"], "131072"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str) -> None:
    refused = python("tools/plan.py", *words, cwd=ROOT)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert message in refused.stderr and refused.stderr.count("\n") == 1
