"""launch/preflight.py over ssh: what is wrong on which host, in one line each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarec.data.sources.synthetic import Shape, prepare_synthetic
from tools.benchmarks.testbed import NetnsHosts

ROOT = Path(__file__).parents[2]
BUSY = (
    "import socket, time; s = socket.create_server(('10.77.0.1', 29500)); print('bound', flush=True); time.sleep(100)"
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    prepare_synthetic(Shape(examples=100), tmp_path / "data")
    run = {
        "model": {"layers": 1},
        "data": {"path": str(tmp_path / "data"), "batch_size": 64},
        "train": {"output_dir": str(tmp_path / "out")},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    return tmp_path / "run.json"


def preflight(lab: NetnsHosts, hostfile: Path, config: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, ROOT / "launch/preflight.py", "--hostfile", hostfile, "--config", config, *arguments]
    with lab.start("host1", command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        output, errors = job.communicate()
    return subprocess.CompletedProcess([], job.returncode, output, errors)


def test_a_table_when_all_is_well(lab: NetnsHosts, config: Path) -> None:
    done = preflight(lab, lab.hostfile, config)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [line.split()[:4] for line in done.stdout.splitlines()]
    assert rows[1:] == [["host1", "10.77.0.1", "eth0", "0-1"], ["host2", "10.77.0.2", "eth0", "2-3"]]


def test_every_failure_names_host_and_remedy(lab: NetnsHosts, config: Path, tmp_path: Path) -> None:
    """A host that is not there, another config on one, a master port in use on another: all reported at once."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(lab.hostfile.read_text() + "host9 slots=2\nhost8 slots=2\n")
    other = tmp_path / "other.json"
    other.write_text(config.read_text() + "\n")
    lab.run("host2", ["mount", "--bind", other, config])
    try:
        with lab.start("host1", [sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as busy:
            assert busy.stdout is not None
            busy.stdout.readline()
            done = preflight(lab, hostfile, config, "--json")
            busy_inside = next(pid for pid, command in lab.processes("host1").items() if BUSY in command)
            lab.run("host1", ["kill", str(busy_inside)])
    finally:
        lab.run("host2", ["umount", config])
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["host1", "host2", "host9", "host8"]
    assert "port 29500 of 10.77.0.1: Address already in use" in lines[0] and "--master-port" in lines[0]
    assert f"{config} has other content; expected the same content as here" in lines[1]
    assert "Could not resolve hostname" in lines[2] and "take it off the hostfile" in lines[2]
    found = json.loads(done.stdout)
    assert not found["ok"]
    assert [(f["host"], f["check"]) for f in found["failures"]] == [
        ("host1", "port"),
        ("host2", "files"),
        ("host9", "ssh"),
        ("host8", "ssh"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("host1 slots=2\nhost2 slots=1\n", "hostfile:2: host2 has slots=1, but host1 has slots=2"),
        ("host1 slots=2\nhost1 slots=2\n", "hostfile:2: host 'host1' is listed twice, first in line 1"),
        ("host1 slots=two\n", "hostfile:1: 'host1 slots=two' is not a host; expected 'NAME slots=N'"),
        ("host1 slots=3\nhost2 slots=3\n", "data.batch_size=64 does not divide: 6 ranks"),
    ],
)
def test_a_bad_hostfile_is_reported_before_any_host_is_asked(
    lab: NetnsHosts, config: Path, text: str, message: str
) -> None:
    hostfile = config.with_name("hostfile")
    hostfile.write_text(text)
    done = preflight(lab, hostfile, config)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
