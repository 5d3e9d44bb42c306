"""Kill -9 at random moments; more of them: `pytest -m slow`, or kills.py itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_a_killed_run_ends_as_if_it_had_not_been(kills: int) -> None:
    command = [sys.executable, str(ROOT / "tests/checkpoint/kills.py"), "--kills", str(kills), "--seed", "5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout.splitlines()[-1])
    assert report["kills"] == kills and report["resumed"] > 0 and max(report["steps"]) > 0
