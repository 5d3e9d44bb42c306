"""Signals and faults through the deepspeed launcher: exit codes, and the cause first."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import psutil
import pytest

from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rendezvous import free_port
from megarec.errors import PREEMPTED, STOPPED
from tests.checkpoint.runs import write_run

ROOT = Path(__file__).parents[2]
DEEPSPEED = Path(sys.executable).with_name("deepspeed")
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fault_launch") / "data"
    prepare_synthetic(Shape(examples=1_000, seed=2), path)
    return path


def start(path: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [DEEPSPEED, "--log_level", "error", "--num_gpus", "2", "--master_port", free_port()]
    command += [ROOT / "launch/train.py", "--config", path]
    pipe = subprocess.PIPE
    return subprocess.Popen([*map(str, command), *arguments], stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT)


def until(output: IO[str] | None, text: str) -> str:
    assert output is not None
    return next(line for line in output if text in line)


def rank(job: "subprocess.Popen[str]", number: int) -> psutil.Process:
    """The process of a rank: the launcher's, not one that it started itself."""
    found = [p for p in psutil.Process(job.pid).children(recursive=True) if p.environ().get("RANK") == str(number)]
    return next(p for p in found if (parent := p.parent()) is not None and "RANK" not in parent.environ())


def listening(job: "subprocess.Popen[str]") -> set[str]:
    """The addresses at which the processes of a job listen."""
    found = [c for p in psutil.Process(job.pid).children(recursive=True) for c in p.net_connections("inet")]
    return {c.laddr.ip for c in found if c.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)}


def test_a_signal_to_one_rank_ends_the_job_with_75_and_it_resumes(data: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, data, train={"epochs": 100_000, "log_every": 5, "output_dir": str(tmp_path / "out")})
    job = start(path)
    until(job.stdout, "step 10/")
    rank(job, 1).send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == PREEMPTED
    first = errors.splitlines()[0]
    assert first.startswith("pre-empted by SIGUSR1 at step ") and first.endswith("resumable with --resume")
    step = int(first.split("saved at step ")[1].split(":")[0])
    pipe = subprocess.PIPE
    command = ["bash", str(ROOT / "launch/run.sh"), "--num_gpus", "2", "--config", str(path), "--resume"]
    environment = {**ENVIRONMENT, "MEGAREC_VENV": sys.prefix}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as job:
        assert until(job.stdout, "resumed from").strip().endswith(f"step-{step:09d}")
        until(job.stdout, "step ")
        assert listening(job) == {"127.0.0.1"}
        job.terminate()
        _, errors = job.communicate(timeout=60)
    assert job.returncode == PREEMPTED, errors


@pytest.mark.slow
def test_sigterm_to_the_launcher_reaches_the_ranks_which_save(data: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, data, train={"epochs": 100_000, "log_every": 5, "output_dir": str(tmp_path / "out")})
    job = start(path)
    until(job.stdout, "step 10/")
    (launcher,) = psutil.Process(job.pid).children()
    launcher.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert job.returncode != 0 and "pre-empted by SIGTERM" in errors
    assert json.loads(next((tmp_path / "out/checkpoints").glob("step-*/index.json")).read_text())["step"] >= 10


def ends(ranks: list[psutil.Process], seconds: float = 60.0) -> None:
    _, left = psutil.wait_procs(ranks, timeout=seconds)
    assert not left, "ranks train on without their launcher"


def test_ranks_whose_launcher_is_gone_save_and_end(data: Path, tmp_path: Path) -> None:
    """SIGTERM, as people and schedulers send it: to the process that they started."""
    path = write_run(tmp_path, data, train={"epochs": 100_000, "log_every": 5, "output_dir": str(tmp_path / "out")})
    job = start(path)
    until(job.stdout, "step 10/")
    ranks = [rank(job, 0), rank(job, 1)]
    job.terminate()
    _, errors = job.communicate(timeout=60)  # the ranks hold the pipe until they have ended
    ends(ranks)
    assert "pre-empted by SIGTERM at step" in errors and "Traceback" not in errors
    assert json.loads(next((tmp_path / "out/checkpoints").glob("step-*/index.json")).read_text())["step"] >= 10


@pytest.mark.slow
def test_ctrl_c_saves(data: Path, tmp_path: Path) -> None:
    """To all processes of the terminal at once; the traceback that is left is of DeepSpeed's launcher."""
    path = write_run(tmp_path, data, train={"epochs": 100_000, "log_every": 5, "output_dir": str(tmp_path / "out")})
    job = start(path)
    until(job.stdout, "step 10/")
    ranks = [rank(job, 0), rank(job, 1)]
    for process in (psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)):
        process.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=60)
    ends(ranks)
    assert "pre-empted by SIGINT at step" in errors and errors.count("Traceback") <= 1, errors
    assert list((tmp_path / "out/checkpoints").glob("step-*/index.json"))


@pytest.mark.slow
def test_a_mistake_that_is_seen_late_ends_with_2_every_time(data: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, data, data={"batch_size": 7}, train={"output_dir": str(tmp_path / "out")})
    for _ in range(3):
        job = start(path)
        _, errors = job.communicate(timeout=300)
        assert job.returncode == 2 and "terminate called" not in errors, errors
        assert [line[:30] for line in errors.splitlines() if line.startswith("error:")] == [
            "error: data.batch_size=7 does "
        ]


@pytest.mark.slow
def test_the_policy_ends_the_job_with_70(data: Path, tmp_path: Path) -> None:
    faults = {"spike": "stop", "spike_window": 2, "spike_deviations": 1e-9}
    path = write_run(tmp_path, data, train={"epochs": 100, "faults": faults, "output_dir": str(tmp_path / "out")})
    job = start(path)
    _, errors = job.communicate(timeout=300)
    assert job.returncode == STOPPED
    assert errors.splitlines()[0].startswith("stopped by the fault policy at step ")
