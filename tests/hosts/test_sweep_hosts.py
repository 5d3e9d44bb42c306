"""A sweep over the hosts of a hostfile: the same table, trials on every host, and nobody left when it is killed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hosts.test_multihost import assert_nobody_is_left
from tests.scaling.studies import write_study
from tests.scaling.test_sweep import FAKED, MODELS, RATES, run_here, starts, table
from tools.benchmarks.testbed import NetnsHosts


def start(lab: NetnsHosts, study: Path, output: Path) -> "subprocess.Popen[str]":
    """With a stand-in for launch/train.py, which takes a fraction of a second."""
    command = [sys.executable, "-c", FAKED, "sweep", "--study", study, "--output", output, "--hostfile", lab.hostfile]
    command += ["--gflop-per-second", "1"]
    return lab.start("host1", [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow  # a sweep of one machine is killed in tests/scaling/test_sweep.py
def test_a_sweep_over_hosts_survives_a_kill_and_gives_the_table_of_one_machine(lab: NetnsHosts, tmp_path: Path) -> None:
    study = write_study(tmp_path, models=MODELS, learning_rates=RATES)
    run_here(study, tmp_path / "here", "--jobs", "2")
    output = tmp_path / 'it\'s $(touch pwned) "there"'
    with start(lab, study, output) as sweep:
        while not list(output.glob("runs/*/at-work-host2-*")):
            assert sweep.poll() is None, sweep.communicate()
            time.sleep(0.01)
        sweep.kill()
    assert_nobody_is_left(lab)
    with start(lab, study, output) as sweep:
        _, complaints = sweep.communicate()
    assert sweep.returncode == 0, complaints
    assert table(output) == table(tmp_path / "here")
    hosts = {json.loads(row.read_text())["host"] for row in output.glob("rows/*.json")}
    assert hosts <= {"host1", "host2", None}  # None: it ended between the kill and the next sweep
    assert list(output.glob("runs/*/at-work-host1-*")) and list(output.glob("runs/*/at-work-host2-*"))
    assert sum(starts(output).values()) <= 6 + 4  # the kill cost a new start of what ran, and no more
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()
    assert_nobody_is_left(lab)
