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


@pytest.mark.slow
def test_the_policy_ends_the_job_with_70(data: Path, tmp_path: Path) -> None:
    faults = {"spike": "stop", "spike_window": 2, "spike_deviations": 1e-9}
    path = write_run(tmp_path, data, train={"epochs": 100, "faults": faults, "output_dir": str(tmp_path / "out")})
    job = start(path)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == STOPPED
    assert errors.splitlines()[0].startswith("stopped by the fault policy at step ")
