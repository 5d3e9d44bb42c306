"""The command-line contract as a user meets it: exit codes, one line on standard error, no chatter."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rendezvous import free_port
from tests.processes import python

ROOT = Path(__file__).parents[1]
DEEPSPEED = Path(sys.executable).with_name("deepspeed")
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("launch")
    prepare_synthetic(Shape(examples=2_000), directory / "data")
    run = {
        "model": {"name": "wukong", "layers": 1, "num_fm": 2, "num_lcb": 2, "rank": 4, "mlp": [8], "dim": 8},
        "data": {"path": str(directory / "data"), "batch_size": 64},
        "train": {"output_dir": str(directory / "out"), "log_every": 10},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }
    path = directory / "run.json"
    path.write_text(json.dumps(run))
    return path


def launch(*arguments: str, deepspeed: Path = DEEPSPEED) -> list[str]:
    job = ["--log_level", "error", "--num_gpus", "2", "--master_port", str(free_port())]
    return [str(deepspeed), *job, str(ROOT / "launch/train.py"), *arguments]


def test_print_config_shows_the_resolved_run(config: Path) -> None:
    done = python(ROOT / "launch/train.py", "--config", config, "--print-config", "--set", "train.epochs=7", real=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train"]["epochs"] == 7


def test_print_config_derives_the_sizes_of_a_scale(config: Path, tmp_path: Path) -> None:
    run = json.loads(config.read_text()) | {"model": {"dim": 8, "scale": 0.01}}
    (tmp_path / "scaled.json").write_text(json.dumps(run))
    command = [ROOT / "launch/train.py", "--config", tmp_path / "scaled.json", "--print-config"]
    done = python(*command)
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["model"]
    assert model["scale"] is None and model["layers"] == 8 and len(model["mlp"]) == 3
    assert f"scale: layers=8, num_fm={model['num_fm']}, " in done.stderr and "asked for 0.01" in done.stderr

    done = python(*command, "--set", "data.path=none")
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["model"]
    assert model["scale"] == 0.01 and "layers" not in model and "left out: data.path='none'" in done.stderr

    done = python(*command, "--set", "model.scale=1e-6")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: model.scale=1e-06: the smallest model of the recipe")


def test_two_ranks_through_the_deepspeed_launcher(config: Path) -> None:
    done = subprocess.run(launch("--config", str(config)), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert (config.parent / "out/metrics.json").is_file()
    lines = done.stdout.splitlines()
    assert any("[INFO] [rank 0] topology: 2 ranks" in line for line in lines)
    ours = [line for line in lines if "] [rank 0] " in line]
    assert ours == (config.parent / "out/log.txt").read_text().splitlines()
    others = [line for line in lines if line not in ours] + done.stderr.splitlines()
    assert not [line for line in others if "WARNING" in line or "INFO" in line]


def test_a_mistake_ends_with_exit_2_and_one_line(config: Path, warm_venv: Path) -> None:
    command = launch("--config", str(config), "--set", "model.layrs=3", deepspeed=warm_venv / "bin/deepspeed")
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == [f"error: {config}: unknown key 'model.layrs'; did you mean 'layers'?"]


def test_a_killed_rank_ends_the_job(config: Path) -> None:
    command = launch(
        "--config",
        str(config),
        "--set",
        "train.epochs=1000",
        "--set",
        "train.output_dir=" + str(config.parent / "killed"),
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if "[rank 0] step " in line:
                break
        ranks = [p for p in psutil.Process(job.pid).children(recursive=True) if "--local_rank=1" in p.cmdline()]
        ranks[0].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        job.stdout.read()
        assert job.wait(timeout=60) != 0
        assert time.monotonic() - killed < 30
