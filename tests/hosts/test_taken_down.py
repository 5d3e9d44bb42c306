"""A host is taken down, its link and all its processes: the job goes on without it, from the latest checkpoint.

The hosts share this machine's disk, as they would share a file system.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarec.checkpoint.pointers import pointed
from megarec.config.load import load_config
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rank_pool import RankPool
from megarec.training.trainer import train
from tests.hosts.test_multihost import wait_for_step
from tools.benchmarks.testbed import NetnsHosts

ROOT = Path(__file__).parents[2]
TIMEOUT = 10  # seconds
STEPS = 40


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """The working directory, with data and a run's config."""
    prepare_synthetic(Shape(examples=1_000), tmp_path / "data")
    run = {
        "model": {"layers": 1, "num_fm": 2, "num_lcb": 2, "rank": 4, "mlp": [256, 256], "dim": 8},
        "data": {"path": "data", "batch_size": 80},
        "train": {
            "epochs": STEPS // 10,
            "log_every": 1,
            "threads": 1,
            "peak_tflops": 1.0,
            "checkpoint_every": 1,
            "keep_checkpoints": 1000,
        },
        "parallel": {"timeout_seconds": TIMEOUT},
        "deepspeed": {"zero_optimization": {"stage": 2}, "tensorboard": {"enabled": True}},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def ranks_of_host2() -> list[psutil.Process]:
    """As seen from this machine, where a signal takes no time."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.NoSuchProcess):
            if str(ROOT / "megarec/train.py") in (process.info["cmdline"] or []):
                found += [process] * (process.environ().get("RANK") in ("2", "3"))
    assert len(found) == 2
    return found


def take_down(lab: NetnsHosts, host: str) -> None:
    """Cut the link, then kill all but the first process (sshd), which is the namespace itself."""
    lab.link(host, up=False)
    lab.run(host, ["kill", "-9", *(str(pid) for pid in lab.processes(host) if pid != 1)])


def stop_within_a_save(checkpoints: Path) -> None:
    """Stop the ranks of host2 at a moment when a save cannot end without them."""
    ranks, deadline = ranks_of_host2(), time.monotonic() + 60
    while time.monotonic() < deadline:
        if not any(checkpoints.glob("*.tmp-*")):
            continue
        for process in ranks:
            process.suspend()
        time.sleep(0.5)
        if any(checkpoints.glob("*.tmp-*")):
            return
        for process in ranks:
            process.resume()
        time.sleep(0.02)
    raise AssertionError("no save was met in flight")


def losses(output: Path) -> dict[int, float]:
    """By step, as logged last."""
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/logloss")}


def resume_here(directory: str, output: str) -> None:
    os.chdir(directory)
    train(load_config(Path("run.json"), [f"train.output_dir={output}"]), resume=True, started=time.time())


@pytest.mark.slow  # minutes: four jobs, and collectives that wait out their timeout
@pytest.mark.parametrize("moment", ["save", "step"])
def test_the_job_goes_on_where_hosts_remain(
    lab: NetnsHosts, directory: Path, rank_pool: Callable[[int], RankPool], moment: str
) -> None:
    checkpoints = directory / "out/checkpoints"
    command = ["bash", str(ROOT / "launch/multihost.sh"), "--hostfile", str(lab.hostfile), "--config", "run.json"]
    command += ["--set", "train.output_dir=out", "--restarts", "1", "--restart-on-remaining"]
    environment = {**os.environ, "MEGAREC_VENV": sys.prefix, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    with lab.start("host1", command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        first_start = wait_for_step(job, 5)
        try:
            if moment == "save":
                stop_within_a_save(checkpoints)
            take_down(lab, "host2")
            latest = pointed(checkpoints, "latest")
            output, errors = job.communicate()
        finally:
            lab.link("host2", up=True)
    assert job.returncode == 0, "".join(first_start) + output + errors
    lines = errors.splitlines()
    cause = f"no answer from other ranks for {TIMEOUT} s"
    assert lines[0].startswith("error: rank") and " on host1: " in lines[0] and cause in lines[0], errors
    assert "  then: ranks 2-3 on host2: no report; its link may be down, or its ranks hang" in lines
    (restart,) = [line for line in lines if line.startswith("RESTART 1 OF 1: ")]
    assert restart.endswith(f"; resuming from {latest}")
    assert any(line.startswith("GOING ON WITHOUT host2: ssh: ") for line in lines)
    assert "topology: 2 ranks = 1 hosts x 2 local ranks" in output
    assert f"resumed from out/checkpoints/{latest}" in output
    assert moment == "step" or "left by a save that never ended" in output

    found = losses(directory / "out")
    assert latest is not None
    step = int(latest.removeprefix("step-"))
    for count in (2, 1):  # the topology that remained, resumed by hand; one process
        by_hand = directory / f"by-hand-{count}"
        shutil.copytree(checkpoints / latest, by_hand / "checkpoints" / latest)
        (by_hand / "checkpoints/latest").write_text(latest + "\n")
        rank_pool(count).run(resume_here, str(directory), by_hand.name)
        expected = losses(by_hand)
        assert sorted(expected) == list(range(step + 1, STEPS + 1))
        assert found[step + 1] == pytest.approx(expected[step + 1], rel=1e-6)
        assert [found[s] for s in expected] == pytest.approx(list(expected.values()), rel=1e-6 if count == 2 else 1e-5)
