"""launch/multihost.sh on two hosts: the same numbers, the true exit code, the cause first, and nobody left
behind; sockets only where they must be."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarec.config.load import load_config
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rank_pool import RankPool
from megarec.training.trainer import train
from tools.benchmarks.testbed import NetnsHosts

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "megarec/train.py"
TIMEOUT = 10  # seconds; ranks that share two busy cores may drift apart by some while they build
ODD = 'it\'s $(touch pwned) "100%n"; `touch pwned`'  # what must never reach a shell as it is


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of every test here, with data and a run's config."""
    path = tmp_path_factory.mktemp("multihost") / ODD
    prepare_synthetic(Shape(examples=1_000), path / "data")
    run = {
        "model": {"layers": 1, "num_fm": 2, "num_lcb": 2, "rank": 4, "mlp": [8], "dim": 8},
        "data": {"path": "data", "batch_size": 80},
        "train": {"log_every": 1, "threads": 1, "peak_tflops": 1.0},
        "deepspeed": {"zero_optimization": {"stage": 1}, "tensorboard": {"enabled": True}},
    }
    (path / "run.json").write_text(json.dumps(run))
    before = Path.cwd()
    os.chdir(path)
    yield path
    os.chdir(before)


def start(lab: NetnsHosts, hostfile: Path, output: str, *arguments: str) -> "subprocess.Popen[str]":
    command = ["bash", str(ROOT / "launch/multihost.sh"), "--hostfile", str(hostfile), "--config", "run.json"]
    command += ["--set", f"train.output_dir={output}", *arguments]
    environment = {**os.environ, "MEGAREC_VENV": sys.prefix, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    return lab.start("host1", command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def process_of(lab: NetnsHosts, host: str, rank: int) -> int:
    """The process id of a rank itself, not of its watcher, on its host."""
    found = lab.run(host, ["sh", "-c", f"grep -lsz ^RANK={rank}$ /proc/[0-9]*/environ"]).stdout.split()
    commands = lab.processes(host)
    (pid,) = [pid for pid in (int(path.split("/")[2]) for path in found) if str(TRAIN) in commands.get(pid, [])]
    return pid


def assert_nobody_is_left(lab: NetnsHosts) -> None:
    deadline = time.monotonic() + 10
    while left := [c for host in lab.addresses for c in lab.processes(host).values() if "sshd" not in c[0]]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def assert_listening_at_their_addresses_alone(lab: NetnsHosts) -> None:
    """A running job's hosts: sshd and gloo at the host's address, the master's port at that of the first, no UDP."""
    for host, address in lab.addresses.items():
        lines = lab.run(host, ["ss", "-Hltn"]).stdout.splitlines()
        places = [line.split()[3].rpartition(":") for line in lines]
        assert {place.strip("[]").partition("%")[0] for place, _, _ in places} == {address}, lines
        ports = {int(port) for _, _, port in places}
        assert 22 in ports and len(ports) > 1 and (29500 in ports) == (host == "host1"), lines
        assert lab.run(host, ["ss", "-Hlun"]).stdout == ""


def wait_for_step(job: "subprocess.Popen[str]", step: int) -> list[str]:
    assert job.stdout is not None and job.stderr is not None
    lines = []
    for line in job.stdout:
        lines.append(line)
        if f"step {step}/" in line:
            return lines
    raise AssertionError(f"the job ended before step {step}:\n{''.join(lines)}{job.stderr.read()}")


def losses(output: Path) -> list[float]:
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [event.value for event in events.Scalars("train/logloss")]


def train_here(directory: str, output: str) -> dict[str, Any]:
    os.chdir(directory)
    config = load_config(Path("run.json"), [f"train.output_dir={output}"])
    return train(config, resume=False, started=time.time())


def test_a_run_from_a_hostfile_equals_the_run_on_one_host(
    lab: NetnsHosts, directory: Path, rank_pool: Callable[[int], RankPool]
) -> None:
    with start(lab, lab.hostfile, ODD) as job:
        output, errors = job.communicate()
    assert job.returncode == 0, errors
    assert errors == ""
    assert "host1  10.77.0.1  eth0       0-1" in output
    assert "topology: 4 ranks = 2 hosts x 2 local ranks" in output
    assert not list(directory.rglob("pwned")) and not Path("/pwned").exists()
    assert_nobody_is_left(lab)
    expected = rank_pool(4).run(train_here, str(directory), "one-host")[0]
    found = json.loads((directory / ODD / "metrics.json").read_text())
    assert found["train"]["steps"] == expected["train"]["steps"] == 10
    assert len(losses(directory / ODD)) == 10
    assert losses(directory / ODD) == pytest.approx(losses(directory / "one-host"), rel=1e-6)
    assert found["test"] == pytest.approx(expected["test"], rel=1e-6)


def test_a_killed_rank_ends_the_job_on_all_hosts_and_is_named_first(lab: NetnsHosts, directory: Path) -> None:
    with start(lab, lab.hostfile, "killed", "--set", "train.epochs=1000") as job:
        wait_for_step(job, 5)
        assert_listening_at_their_addresses_alone(lab)
        lab.run("host2", ["kill", "-9", str(process_of(lab, "host2", 3))])
        killed = time.monotonic()
        _, errors = job.communicate()
        seconds = time.monotonic() - killed
    print(f"{seconds:.1f} s from kill -9 to the end of the job")
    assert job.returncode == 128 + 9
    lines = errors.splitlines()
    assert lines[0] == "error: rank 3 on host2: killed by signal 9 (SIGKILL)", errors
    # A rank that ends because of rank 3 is lost to those that had not noticed before: on a busy machine some name it.
    assert all(line.startswith("  then: ") and "lost the connection to host" in line for line in lines[1:]), errors
    assert any("lost the connection to host2 (ranks 2-3)" in line for line in lines[1:]), errors
    assert seconds < 10
    assert_nobody_is_left(lab)


def test_a_link_that_drops_ends_the_job_within_the_timeout(lab: NetnsHosts, directory: Path) -> None:
    hostfile = directory / "two-ranks"
    hostfile.write_text("host1 slots=1\nhost2 slots=1\n")
    arguments = ["--launcher", "torchrun", "--set", "train.epochs=1000", "--set", f"parallel.timeout_seconds={TIMEOUT}"]
    with start(lab, hostfile, "cut", *arguments) as job:
        wait_for_step(job, 5)
        assert_listening_at_their_addresses_alone(lab)
        try:
            lab.link("host2", up=False)
            cut = time.monotonic()
            _, errors = job.communicate()
            seconds = time.monotonic() - cut
        finally:
            lab.link("host2", up=True)
    print(f"{seconds:.1f} s from the cut to the end of the job")
    assert job.returncode == 1, errors
    causes = [line for line in errors.splitlines() if line.startswith(("error: ", "  then: "))]
    assert causes[0].startswith(f"error: rank 0 on host1: no answer from other ranks for {TIMEOUT} s")
    assert causes[1] == "  then: rank 1 on host2: no report; its link may be down, or its ranks hang"
    assert "Traceback" not in errors
    assert TIMEOUT <= seconds < TIMEOUT + 10
    assert_nobody_is_left(lab)
