"""tools/plan.py: design.md's keys, a table and one sentence, and mistakes as one line."""

import json
from pathlib import Path

import pytest

from tests.processes import python

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ["--config", "ds_configs/dlrm-criteo-terabyte.json", "--set", "embedding.placement=auto"]
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*CONFIG, "--hardware", "h10", "--hosts", "2"], "--hardware h10: no such machine is known here; did you mean"),
        (
            [*CONFIG, "--hardware", "h100", "--hosts", "2", "--ranks-per-host", "16"],
            "--ranks-per-host 16: a host of H100 has 8",
        ),
        ([*CONFIG, "--hardware", "h100", "--hosts", "0"], "--hosts 0: expected at least 1"),
        ([*CONFIG, "--hosts", "2"], "give --hardware (or --measure FILE alone)"),
        (["--measure", "m.json", "--hosts", "2", "--json"], "--measure FILE stands alone: leave --hosts, --json out"),
        ([*CONFIG, "--hardware", "h100", "--hosts", "3"], "131072"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str) -> None:
    refused = python("tools/plan.py", *words, cwd=ROOT)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert said in refused.stderr and refused.stderr.count("\n") == 1
