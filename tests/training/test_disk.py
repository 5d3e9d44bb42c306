"""An output directory that is full or turns read-only while a run trains: what cannot be written is a line, no end."""

import ctypes
import errno
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarec.config.load import load_config
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.training import trainer
from megarec.training.trainer import Trainer, train
from tests.checkpoint.runs import write_run
from tests.logged import logged_lines
from tests.processes import python

ROOT = Path(__file__).parents[2]
CLONE_NEWNS = 0x00020000
WRITERS = {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "data"
    prepare_synthetic(Shape(examples=1_000, seed=2), path)
    return path


def test_a_disk_that_fills_while_a_run_trains(data: Path, tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    """All through: the CSV files fill it at the first log line; metrics.json is one line at the end."""
    output = small_disk("size=100k") / "out"
    wishes = {"epochs": 3, "log_every": 1, "output_dir": str(output)}
    path = write_run(tmp_path, data, train=wishes, deepspeed=WRITERS)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = python(ROOT / "launch/train.py", "--config", path, env=environment)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {output}/metrics.json: cannot be written (No space left on device); the log has the metrics, and no "
        "checkpoint was saved\n"
    )
    warned = [line.partition("[rank 0] ")[2] for line in done.stdout.splitlines() if "[WARNING]" in line]
    for text in ("CSV ENDS HERE", "TENSORBOARD ENDS HERE", f"{output}/log.txt ENDS HERE", "CHECKPOINT OF STEP 30 WAS"):
        (line,) = (line for line in warned if line.startswith(text))
        assert "No space left on device" in line
    assert "step 30/30" in done.stdout and "test  at step 30, the last: AUC" in done.stdout
    assert "Traceback" not in done.stdout


def train_until_read_only(path: Path, overrides: list[str]) -> tuple[str, list[str]]:
    """The output directory is read-only from the first save on; how the run ends, and what it logged."""
    logged, save = logged_lines(), Trainer._save
    output = Path(load_config(path, overrides).train.output_dir)
    if ctypes.CDLL(None).unshare(CLONE_NEWNS):  # mounts of this thread, and of those that it starts, alone
        return "no mounts here", logged
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)

    def read_only(at_work: Trainer, best: bool) -> None:
        if not output.is_mount():
            for options in (["--bind", str(output)], ["-o", "remount,bind,ro"]):
                subprocess.run(["mount", *options, str(output)], check=True)
        save(at_work, best)

    Trainer._save = read_only  # type: ignore[method-assign]
    try:
        train(load_config(path, overrides), resume=False, started=time.time())
    except UserError as error:
        return str(error), logged
    finally:
        Trainer._save = save  # type: ignore[method-assign]
    return "", logged


def test_an_output_directory_that_turns_read_only(
    rank_pool: Callable[[int], RankPool], data: Path, tmp_path: Path
) -> None:
    wishes = {"max_steps": 6, "log_every": 1, "checkpoint_every": 2, "trace": [3, 4], "keep_checkpoints": 1}
    path = write_run(tmp_path, data, train={**wishes, "output_dir": str(tmp_path / "out")}, deepspeed=WRITERS)
    (error, logged), (other, _) = rank_pool(2).run(train_until_read_only, path, [])
    if error == "no mounts here":
        pytest.skip(error)
    assert error == other
    assert error.startswith(f"{tmp_path}/out/metrics.json: cannot be written (Read-only file system); the log has")
    assert error.endswith("and no checkpoint was saved")
    warned = [line for line in logged if line.startswith("WARNING")]
    for text in ("CSV ENDS", "TENSORBOARD ENDS", "STEP 2 WAS NOT", "STEP 4 WAS NOT", "STEP 6 WAS NOT", "HAS NO TRACE"):
        assert len([line for line in warned if text in line and "\n" not in line]) == 1, (text, logged)


def error_at(path: Path, name: str) -> str:
    """What a run ends with whose file of that name cannot be written."""
    write = trainer.write_whole

    def refuse(file: Path, content: bytes) -> None:
        if file.name == name:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        write(file, content)

    trainer.write_whole = refuse
    try:
        train(load_config(path), resume=False, started=time.time())
    except UserError as error:
        return str(error)
    finally:
        trainer.write_whole = write
    return ""


def test_a_file_of_the_run_that_cannot_be_written_ends_all_ranks_with_the_same_line(
    rank_pool: Callable[[int], RankPool], data: Path, tmp_path: Path
) -> None:
    wishes: dict[str, Any] = {"max_steps": 2, "output_dir": str(tmp_path / "out")}
    path = write_run(tmp_path, data, train=wishes)
    endings = {
        "config.json": "nothing was trained; fix that and start again",
        "metrics.json": "the log has the metrics, and --resume goes on from the checkpoint of step 2",
    }
    for name, end in endings.items():
        expected = f"{tmp_path}/out/{name}: cannot be written (Read-only file system); {end}"
        assert rank_pool(2).run(error_at, path, name) == [expected] * 2
