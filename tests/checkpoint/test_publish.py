"""Publishing without a run: kills between any two operations, disks without room, and leftovers."""

import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megarec.checkpoint import publish as module
from megarec.checkpoint.format import read_index
from megarec.checkpoint.pointers import name_of, pointed
from megarec.checkpoint.publish import Plan, SaveFailed, clean, publish, published, write_part
from megarec.checkpoint.reading import Reader, verify
from megarec.checkpoint.snapshot import Snapshot
from megarec.slices import TensorSlice
from tests.checkpoint.test_checkpoint_files import ABOUT

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def plan_of(checkpoints: Path, step: int, token: str = "t", ranks: int = 1) -> Plan:
    return Plan(checkpoints, step, token, ranks, ABOUT, ("latest",), keep=1, timeout=60.0)


def part(plan: Plan, rank: int = 0, value: float = 1.0) -> SaveFailed | None:
    """Write a rank's file; returns its failure."""
    snapshot = Snapshot()
    snapshot.take([TensorSlice(f"w{rank}", (4,), (0,), torch.full((4,), value))])
    try:
        write_part(plan, rank, snapshot)
    except SaveFailed as failure:
        return failure
    return None


def save(checkpoints: Path, step: int, value: float = 1.0, token: str = "t") -> None:
    plan = plan_of(checkpoints, step, token)
    publish(plan, part(plan, value=value))


def value_of(checkpoint: Path) -> float:
    """Of a checkpoint that is proven to be whole."""
    index = read_index(checkpoint)
    verify(checkpoint, index)
    piece = TensorSlice("w0", (4,), (0,), torch.zeros(4))
    Reader(checkpoint, index).fill(piece)
    return float(piece.tensor[3])


def killed_at(change: int, checkpoints: Path, step: int) -> bool:
    """Save a step in a process that dies by kill -9 before its n-th change of a file; False: it came to its end."""
    process = os.fork()
    if process == 0:
        left = change

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in CHANGES:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        save(checkpoints, step, value=2.0, token="u")
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("step", [100, pytest.param(200, marks=pytest.mark.slow)], ids=["again", "next"])
def test_a_kill_at_any_moment_leaves_what_latest_names(tmp_path: Path, step: int) -> None:
    """Step 100 is there, and is saved a second time, or step 200 takes its place."""
    values, change, in_between = [], 0, 0
    while True:
        checkpoints = tmp_path / str(change)
        save(checkpoints, 100)
        killed = killed_at(change, checkpoints, step)
        in_between += pointed(checkpoints, "latest") is None
        clean(checkpoints)
        name = pointed(checkpoints, "latest")
        assert name is not None, f"killed before change {change}: {sorted(checkpoints.iterdir())}"
        values.append(value_of(checkpoints / name))
        assert published(checkpoints)[-1] in (name_of(100), name) and not list(checkpoints.glob("*.tmp-*"))
        for other in published(checkpoints):
            value_of(checkpoints / other)
        if not killed:
            break
        change += 1
    assert values == sorted(values) and values[0] == 1.0 and values[-1] == 2.0
    assert step == 200 or in_between, "no kill fell between the two renames: this test shows nothing"


def test_a_rename_that_fails_gives_the_old_one_its_name_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 100)
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp-u"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(SaveFailed, match="Input/output error"):
        save(tmp_path, 100, value=2.0, token="u")
    assert value_of(tmp_path / name_of(100)) == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {name_of(100), "latest"}


def seconds_of_failure(plan: Plan, failure: SaveFailed | None, expected: str) -> float:
    began = time.monotonic()
    with pytest.raises(SaveFailed, match=expected):
        publish(plan, failure)
    return time.monotonic() - began


def test_a_directory_that_cannot_be_made_ends_the_save_at_once(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 1, ranks=2)
    plan.temporary.write_text("a file in its place")
    failures = [part(plan, rank) for rank in (0, 1)]
    assert "File exists" in str(failures[1])
    assert seconds_of_failure(plan, failures[0], "rank 0: .*File exists") < 5.0


def test_a_disk_without_inodes(small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one for the directory, the file, or the mark of a rank: the cause is reported, and nobody waits."""
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)  # for the one case in which no rank finds room for a mark
    disk = small_disk("size=1m,nr_inodes=12")
    for free in range(4):
        made = list(filled(disk))
        for path in made[:free]:
            path.rmdir()
        plan = plan_of(disk, 1, ranks=2)
        failures = [part(plan, rank) for rank in (0, 1)]
        assert failures[1] is not None
        assert seconds_of_failure(plan, failures[0], r"rank \d: .*No space left on device") < 5.0
        for path in made[free:]:
            path.rmdir()
        assert not list(disk.iterdir())


def filled(directory: Path) -> Iterator[Path]:
    """Directories until no more can be made."""
    for number in range(1000):
        try:
            (directory / f"filler-{number}").mkdir()
        except OSError:
            return
        yield directory / f"filler-{number}"


def test_after_a_failure_only_ranks_at_work_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    plan = plan_of(tmp_path, 1, ranks=3)
    failure = part(plan, 0, value=float("nan"))
    part(plan, 1)
    assert (
        seconds_of_failure(
            plan, failure, "^rank 0: w0@0 has numbers that are not finite; no sign of rank 2 within 1 s$"
        )
        < 5.0
    )
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "megarec")

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        save(tmp_path, 2)
        (warning,) = caplog.records
        assert warning.levelname == "WARNING" and "Directory not empty" in warning.getMessage()
        assert published(tmp_path) == [name_of(2)] and pointed(tmp_path, "latest") == name_of(2)
        caplog.clear()
        clean(tmp_path)
        (warning,) = caplog.records
        assert warning.levelname == "WARNING" and "Directory not empty" in warning.getMessage()
        assert warning.getMessage().startswith(f"{tmp_path / name_of(1)}.tmp-gone")
    caplog.clear()
    clean(tmp_path)
    (removed,) = caplog.messages
    assert removed.startswith("removed ")
    assert {path.name for path in tmp_path.iterdir()} == {name_of(2), "latest"}


def test_a_directory_that_is_gone_ends_the_wait_at_once(tmp_path: Path) -> None:
    """Rank 0 waited silently for the timeout of the collectives."""
    plan = Plan(tmp_path / "checkpoints", 3, "t", 2, {}, ("latest",), keep=2, timeout=600.0)
    plan.temporary.mkdir(parents=True)
    plan.checkpoints.rename(tmp_path / "elsewhere")
    began = time.monotonic()
    with pytest.raises(SaveFailed, match=r"step-000000003.tmp-t is gone: removed or renamed"):
        publish(plan)
    assert time.monotonic() - began < 5


def test_a_mark_that_cannot_come_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.2)
    plan = Plan(tmp_path / "checkpoints", 3, "t", 2, {}, ("latest",), keep=2, timeout=600.0)
    plan.temporary.mkdir(parents=True)
    others = module.OtherParts()
    others.ended.set()
    with pytest.raises(SaveFailed, match="no sign of rank 0, 1 within"):  # it says nothing, and its file is not there
        publish(plan, None, others)
    plan.temporary.mkdir()
    others.failures = {0: "full", 1: "Read-only file system"}
    with pytest.raises(SaveFailed, match="rank 0: full; rank 1: Read-only file system"):
        publish(plan, None, others)


def test_a_pointer_names_a_checkpoint_beside_it_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    good = checkpoints / "step-000000003"
    for directory in (good, tmp_path / "step-000000009", checkpoints / "step-99999999999999999999"):
        directory.mkdir(parents=True)
    (checkpoints / "latest").write_text("step-000000003\n")
    assert pointed(checkpoints, "latest") == "step-000000003"
    wrong = ["../step-000000009", "/", "..", "step-3", "step-99999999999999999999", "step-٣٣٣٣٣٣٣٣٣", "\0", "a" * 9_999]
    for name in wrong:
        (checkpoints / "latest").write_text(name)
        assert pointed(checkpoints, "latest") is None, name
    (checkpoints / "latest").unlink()
    os.mkfifo(checkpoints / "latest")
    assert pointed(checkpoints, "latest") is None
    assert published(checkpoints) == ["step-000000003"]
