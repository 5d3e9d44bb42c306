"""One run at a time in a directory, whatever its predecessor died of, and the earlier run moved aside whole."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from megarec.config.load import load_config
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed.rank_pool import RankPool
from megarec.errors import UserError
from megarec.training import run_directory
from megarec.training.run_directory import OWNER_FILE, only_run_in, set_aside
from megarec.training.trainer import train

ROOT = Path(__file__).parents[2]
# Another run, as its lock shows it: no import of torch.
OWNER = """
import fcntl, json, os, socket, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": "2026-11-29 10:00:00"}))
file.flush()
print("owns", flush=True)
time.sleep(600)
"""


def owner_of(output: Path) -> "subprocess.Popen[str]":
    output.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", OWNER, output / OWNER_FILE], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "owns\n"
    return process


def owned(output: Path) -> AbstractContextManager[str | None]:
    return only_run_in(output, torch.device("cpu"))


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "PATIENCE_SECONDS", 0.3)


def test_a_second_run_is_refused_and_the_owner_is_named(tmp_path: Path) -> None:
    with owner_of(tmp_path / "out") as owner:
        with pytest.raises(UserError) as refused, owned(tmp_path / "out"):
            pass
        host = re.escape(socket.gethostname())
        assert re.search(rf"train\.output_dir='.*out': process {owner.pid} on host '{host}'", str(refused.value))
        assert "\n" not in str(refused.value) and "choose another train.output_dir" in str(refused.value)
        owner.kill()
    with owned(tmp_path / "out") as remark:  # a dead owner holds nothing
        assert remark is None
        assert json.loads((tmp_path / "out" / OWNER_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "out" / OWNER_FILE).exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x"}', "[" * 4000, "\udcff"])
def test_an_owner_that_has_not_given_its_name(tmp_path: Path, text: str) -> None:
    with (tmp_path / OWNER_FILE).open("wb") as file:
        file.write(text.encode(errors="surrogateescape"))
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run, which has not given its name, trains"), owned(tmp_path):
            pass
    (tmp_path / OWNER_FILE).write_bytes(text.encode(errors="surrogateescape"))
    with owned(tmp_path):  # text without a lock says nothing
        pass


def test_the_ranks_of_a_killed_start_get_time_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "PATIENCE_SECONDS", 60.0)
    with owner_of(tmp_path / "out") as owner:
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {owner.pid}"]).wait()
        with owned(tmp_path / "out"):
            pass


def test_what_was_not_written_to_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), owned(tmp_path / "a/b"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with owned(tmp_path / "a/b"):
        (tmp_path / "a/b/log.txt").touch()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["log.txt"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with owned(tmp_path) as remark:
        assert remark is not None and "this file system has no locks" in remark


def test_a_place_that_cannot_be_owned_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / OWNER_FILE).symlink_to(tmp_path / "victim")
    for place in ("file", "file/below", "link"):
        expected = rf"train\.output_dir='.*{place}': \.owner cannot be written there \("
        with pytest.raises(UserError, match=expected), owned(tmp_path / place):
            pass
    assert not (tmp_path / "victim").exists()


def test_a_run_is_moved_aside_whole_and_what_is_not_its_own_stays(tmp_path: Path) -> None:
    assert set_aside(tmp_path) is None
    for name in ("config.json", "metrics.json", "log.txt", "notes.txt", "output.txt"):
        (tmp_path / name).write_text(name)
    for name in ("tensorboard/events", "checkpoints/step-000000001/index.json", "trace/t", "csv/mine.csv"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    assert set_aside(tmp_path) == tmp_path / "previous"
    stayed = {"notes.txt", "output.txt", "csv", "previous"}
    assert {path.name for path in tmp_path.iterdir()} == stayed
    assert (tmp_path / "previous/checkpoints/step-000000001/index.json").is_file()
    assert set_aside(tmp_path) is None
    (tmp_path / "csv/train_logloss.csv").touch()
    assert set_aside(tmp_path) == tmp_path / "previous-2"
    assert (tmp_path / "previous-2/csv/mine.csv").is_file()
    (tmp_path / "checkpoints/step-000000002.tmp-abc").mkdir(parents=True)
    assert set_aside(tmp_path) is None


def error_on_a_rank(path: Path) -> str:
    run_directory.PATIENCE_SECONDS = 0.3
    try:
        train(load_config(path, []), resume=False, started=time.time())
    except UserError as error:
        return str(error)
    return ""


def test_every_rank_of_the_second_run_is_refused_and_nothing_is_touched(
    rank_pool: Callable[[int], RankPool], tmp_path: Path
) -> None:
    prepare_synthetic(Shape(examples=500, seed=2), tmp_path / "data")
    model = {"layers": 1, "num_fm": 2, "num_lcb": 2, "rank": 4, "mlp": [8], "dim": 8}
    run = {
        "model": model,
        "data": {"path": str(tmp_path / "data"), "batch_size": 100},
        "train": {"max_steps": 2, "output_dir": str(tmp_path / "out")},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    with owner_of(tmp_path / "out") as owner:
        (tmp_path / "out/metrics.json").write_text("{}")
        messages = rank_pool(2).run(error_on_a_rank, tmp_path / "run.json")
        assert len(set(messages)) == 1 and f"process {owner.pid} on host" in messages[0]
        assert {path.name for path in (tmp_path / "out").iterdir()} == {OWNER_FILE, "metrics.json"}
        owner.send_signal(signal.SIGKILL)
    assert rank_pool(2).run(error_on_a_rank, tmp_path / "run.json") == ["", ""]
    assert (tmp_path / "out/previous/metrics.json").read_text() == "{}"
