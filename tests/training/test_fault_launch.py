"""Signals and faults through the deepspeed launcher: exit codes, and the cause first."""

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeAlias

import psutil
import pytest

from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rendezvous import free_port
from megarec.errors import PREEMPTED, STOPPED
from tests.checkpoint.runs import write_run

ROOT = Path(__file__).parents[2]
DEEPSPEED = Path(sys.executable).with_name("deepspeed")
SECONDS = 240.0  # that a job may take on a busy machine
MARK = "MEGAREC_TEST_JOB"
Job: TypeAlias = "subprocess.Popen[str]"
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fault_launch") / "data"
    prepare_synthetic(Shape(examples=1_000, seed=2), path)
    return path


def the_jobs_own(mark: str) -> list[psutil.Process]:
    """All processes of a job, orphans too, by a variable of their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


@pytest.fixture
def start() -> Iterator[Callable[..., Job]]:
    """`start(command, **environment)`: a job that does not outlive its test, nor the time that it may take.

    A test in a background job of a script has SIGINT ignored, and so would the job: Ctrl-C would never end it.
    """
    mark, timers = secrets.token_hex(8), []

    def kill() -> None:
        for process in the_jobs_own(mark):
            with suppress(psutil.Error):
                process.kill()

    def started(*command: object, **environment: str) -> Job:
        pipe = subprocess.PIPE
        job = subprocess.Popen(
            [str(word) for word in command],
            stdout=pipe,
            stderr=pipe,
            text=True,
            env={**ENVIRONMENT, **environment, MARK: mark},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        timers.append(threading.Timer(SECONDS, kill))
        timers[-1].daemon = True
        timers[-1].start()
        return job

    yield started
    for timer in timers:
        timer.cancel()
    kill()


def deepspeed(path: Path, *words: str) -> list[object]:
    launcher = [DEEPSPEED, "--log_level", "error", "--num_gpus", "2", "--master_port", free_port()]
    return [*launcher, ROOT / "launch/train.py", "--config", path, *words]


def until(output: IO[str] | None, text: str) -> str:
    assert output is not None
    line = next((line for line in output if text in line), None)
    assert line is not None, f"the job ended without {text!r}, or was ended after {SECONDS:g} s"
    return line


def rank(job: Job, number: int) -> psutil.Process:
    """The process of a rank: the launcher's, not one that it started itself."""
    found = [p for p in psutil.Process(job.pid).children(recursive=True) if p.environ().get("RANK") == str(number)]
    return next(p for p in found if (parent := p.parent()) is not None and "RANK" not in parent.environ())


def listening(job: Job) -> set[str]:
    """The addresses at which the processes of a job listen."""
    found = [c for p in psutil.Process(job.pid).children(recursive=True) for c in p.net_connections("inet")]
    return {c.laddr.ip for c in found if c.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)}


def test_a_signal_to_one_rank_ends_the_job_with_75_and_it_resumes(
    start: Callable[..., Job], data: Path, tmp_path: Path
) -> None:
    path = write_run(tmp_path, data, train={"epochs": 100_000, "log_every": 5, "output_dir": str(tmp_path / "out")})
    job = start(*deepspeed(path))
    until(job.stdout, "step 10/")
    rank(job, 1).send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=SECONDS)
    assert job.returncode == PREEMPTED
    first = errors.splitlines()[0]
    assert first.startswith("pre-empted by SIGUSR1 at step ") and first.endswith("resumable with --resume")
    step = int(first.split("saved at step ")[1].split(":")[0])
    command = ["bash", ROOT / "launch/run.sh", "--num_gpus", "2", "--config", path, "--resume"]
    job = start(*command, MEGAREC_VENV=sys.prefix)
    assert until(job.stdout, "resumed from").strip().endswith(f"step-{step:09d}")
    until(job.stdout, "step ")
    assert listening(job) == {"127.0.0.1"}
    job.terminate()
    _, errors = job.communicate(timeout=SECONDS)
    assert job.returncode == PREEMPTED, errors


@pytest.mark.slow
def test_sigterm_to_the_launcher_reaches_the_ranks_which_save(
    start: Callable[..., Job], data: Path, tmp_path: Path
) -> None:
    path = write_run(tmp_path, data, train={"epochs": 100_000, "log_every": 5, "output_dir": str(tmp_path / "out")})
    job = start(*deepspeed(path))
    until(job.stdout, "step 10/")
    (launcher,) = psutil.Process(job.pid).children()
    launcher.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=SECONDS)
    assert job.returncode != 0 and "pre-empted by SIGTERM" in errors
    assert json.loads(next((tmp_path / "out/checkpoints").glob("step-*/index.json")).read_text())["step"] >= 10


def ends(ranks: list[psutil.Process], seconds: float = SECONDS) -> None:
    _, left = psutil.wait_procs(ranks, timeout=seconds)
    assert not left, "ranks train on without their launcher"


@pytest.mark.slow  # a second way for a job to end
def test_ranks_whose_launcher_is_gone_save_and_end(start: Callable[..., Job], data: Path, tmp_path: Path) -> None:
    """SIGTERM, as people and schedulers send it: to the process that they started."""
    path = write_run(tmp_path, data, train={"epochs": 100_000, "log_every": 5, "output_dir": str(tmp_path / "out")})
    job = start(*deepspeed(path))
    until(job.stdout, "step 10/")
    ranks = [rank(job, 0), rank(job, 1)]
    job.terminate()
    _, errors = job.communicate(timeout=SECONDS)  # the ranks hold the pipe until they have ended
    ends(ranks)
    assert "pre-empted by SIGTERM at step" in errors and "Traceback" not in errors
    assert json.loads(next((tmp_path / "out/checkpoints").glob("step-*/index.json")).read_text())["step"] >= 10


@pytest.mark.slow
def test_ctrl_c_saves(start: Callable[..., Job], data: Path, tmp_path: Path) -> None:
    """To all processes of the terminal at once; the traceback that is left is of DeepSpeed's launcher."""
    path = write_run(tmp_path, data, train={"epochs": 100_000, "log_every": 5, "output_dir": str(tmp_path / "out")})
    job = start(*deepspeed(path))
    until(job.stdout, "step 10/")
    ranks = [rank(job, 0), rank(job, 1)]
    for process in (psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)):
        process.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=SECONDS)
    ends(ranks)
    assert "pre-empted by SIGINT at step" in errors and errors.count("Traceback") <= 1, errors
    assert list((tmp_path / "out/checkpoints").glob("step-*/index.json"))


@pytest.mark.slow
def test_a_mistake_that_is_seen_late_ends_with_2_every_time(
    start: Callable[..., Job], data: Path, tmp_path: Path
) -> None:
    path = write_run(tmp_path, data, data={"batch_size": 7}, train={"output_dir": str(tmp_path / "out")})
    for _ in range(3):
        job = start(*deepspeed(path))
        _, errors = job.communicate(timeout=SECONDS)
        assert job.returncode == 2 and "terminate called" not in errors, errors
        assert [line[:30] for line in errors.splitlines() if line.startswith("error:")] == [
            "error: data.batch_size=7 does "
        ]


@pytest.mark.slow
def test_the_policy_ends_the_job_with_70(start: Callable[..., Job], data: Path, tmp_path: Path) -> None:
    faults = {"spike": "stop", "spike_window": 2, "spike_deviations": 1e-9}
    path = write_run(tmp_path, data, train={"epochs": 100, "faults": faults, "output_dir": str(tmp_path / "out")})
    job = start(*deepspeed(path))
    _, errors = job.communicate(timeout=SECONDS)
    assert job.returncode == STOPPED
    assert errors.splitlines()[0].startswith("stopped by the fault policy at step ")
