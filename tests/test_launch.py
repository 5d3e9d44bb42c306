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


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["towers", "two"], "error: JOBS two: expected a whole number from 1 on\n"),
        (
            ["towers", "2", "tower"],
            "error: STUDY tower: no ds_configs/studies/tower.json; expected towers or towers-first\n",
        ),
        (
            ["search", "2", "ml"],
            "error: NAME ml: expected movielens-100k, movielens-100k-by-time or movielens-1m\n",
        ),
    ],
)
def test_a_study_is_refused_before_its_data_are_made(words: list[str], message: str) -> None:
    script = [ROOT / f"launch/{words[0]}.sh", *words[1:]]
    done = subprocess.run(["bash", *script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


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


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29777"}, "MASTER_ADDR is not set, while"),
        ({**ALONE, "MASTER_PORT": "no number"}, "MASTER_PORT='no number', while RANK is set: expected a whole number"),
        ({**ALONE, "RANK": "3", "WORLD_SIZE": "2"}, "RANK='3', while RANK is set: expected a whole number from 0 to 1"),
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, "WORLD_SIZE='', while RANK is set: expected a whole number"),
        ({**ALONE, "MASTER_ADDR": ""}, "MASTER_ADDR='', while RANK is set: expected"),
        ({**ALONE, "LOCAL_RANK": "-1"}, "LOCAL_RANK='-1', while RANK is set: expected a whole number from 0 to 0"),
        ({**ALONE, "LOCAL_RANK": "7"}, "LOCAL_RANK='7', while RANK is set: expected a whole number from 0 to 0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE='2', while RANK is not set: expected RANK beside it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_variable_of_a_launcher_ends_with_one_line(
    config: Path, tmp_path: Path, variables: dict[str, str], line: str
) -> None:
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in (*ALONE, "LOCAL_SIZE")} | variables
    output = f"train.output_dir={tmp_path / 'out'}"
    done = python(ROOT / "launch/train.py", "--config", config, "--set", output, env=environment)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.startswith(f"error: {line}") and done.stderr.count("\n") == 1
