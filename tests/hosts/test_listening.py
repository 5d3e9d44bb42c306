"""What a job listens on: the master's port and gloo's sockets, at the addresses of its network, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megarec.launching.lab import Lab
from tests.hosts.test_multihost import directory, start, wait_for_step  # noqa: F401

ROOT = Path(__file__).parents[2]


def listening(lines: str) -> set[tuple[str, int]]:
    """(address, port) of what `ss -Hltn` or `ss -Hlun` shows."""
    found = set()
    for line in lines.splitlines():
        address, _, port = line.split()[3].rpartition(":")
        found.add((address.strip("[]").partition("%")[0], int(port)))
    return found


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_job_on_hosts_listens_at_their_addresses_alone(lab: Lab, directory: Path, launcher: str) -> None:  # noqa: F811
    with start(lab, lab.hostfile, f"listen-{launcher}", "--launcher", launcher, "--set", "train.epochs=1000") as job:
        wait_for_step(job, 3)
        tcp = {host: listening(lab.run(host, ["ss", "-Hltn"]).stdout) for host in lab.addresses}
        udp = {host: lab.run(host, ["ss", "-Hlun"]).stdout for host in lab.addresses}
        (launcher_pid,) = [pid for pid, c in lab.processes("host1").items() if "megarec.launching.multihost" in c]
        lab.run("host1", ["kill", str(launcher_pid)])
        _, errors = job.communicate()
    assert job.returncode == 75, errors
    for host, address in lab.addresses.items():
        assert {place for place, _ in tcp[host]} == {address}, tcp[host]
        assert (address, 22) in tcp[host] and udp[host] == ""
    assert ("10.77.0.1", 29500) in tcp["host1"] and ("10.77.0.2", 29500) not in tcp["host2"]


def test_a_job_on_one_machine_listens_on_loopback_alone(directory: Path) -> None:  # noqa: F811
    command = ["bash", str(ROOT / "launch/run.sh"), "--num_gpus", "2", "--config", "run.json"]
    command += ["--set", "train.output_dir=listen-one", "--set", "train.epochs=1000"]
    environment = {**os.environ, "MEGAREC_VENV": sys.prefix}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        wait_for_step(job, 3)
        found = []
        for process in psutil.Process(job.pid).children(recursive=True):
            found += [c.laddr.ip for c in process.net_connections("inet") if c.status in ("LISTEN", "NONE")]
        job.terminate()
        _, errors = job.communicate()
    assert found and set(found) == {"127.0.0.1"}
    assert job.returncode == 75, errors
