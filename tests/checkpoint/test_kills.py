"""Kill -9 at random moments; more of them: `pytest -m slow`, or kills.py itself."""

import json
import os
from pathlib import Path

import pytest

from tests.processes import python

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kills", [2, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_a_killed_run_ends_as_if_it_had_not_been(kills: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [ROOT / "tests/checkpoint/kills.py", "--kills", kills, "--seed", 5]
    found = python(*command, env=environment, timeout=3600)
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout.splitlines()[-1])
    assert report["kills"] == kills and report["resumed"] > 0 and max(report["steps"]) > 0
