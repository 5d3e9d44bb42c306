"""From every rank's file to a published checkpoint; the ranks meet in files, never in a collective.

    each rank   writes its file into <name>.tmp-<token>/, then a mark with its size, checksum and slices
    rank 0      waits for all marks, checks sizes, writes index.json, renames the directory, then moves the pointers

A kill at any moment leaves whole checkpoints, pointers to whole checkpoints, and directories *.tmp-* that the next
start removes. The file system must be shared by all hosts, with a rename that is atomic (POSIX).
"""

import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarec.checkpoint.format import DTYPE_NAMES, INDEX, FileEntry
from megarec.checkpoint.pointers import BEST, LATEST, NAME, name_of, pointed
from megarec.checkpoint.writing import Snapshot, key_of, sync_directory, write_file, write_json

POLL_SECONDS = 0.01, 0.2  # between looks for the other ranks' marks: at first, at most


class SaveFailed(Exception):
    """A checkpoint was not published; the run goes on."""


@dataclass(frozen=True)
class Plan:
    """One save, the same on every rank.

    Attributes:
        checkpoints: the directory of all checkpoints.
        step: of the run; names the checkpoint.
        token: tells this save's temporary directory from those of other saves and jobs.
        ranks: how many write.
        about: index.json but for tensors and files.
        pointers: which ones move to it.
        keep: how many of the newest checkpoints stay; those that pointers name stay as well.
        timeout: seconds that rank 0 waits for the others.
    """

    checkpoints: Path
    step: int
    token: str
    ranks: int
    about: dict[str, Any]
    pointers: tuple[str, ...]
    keep: int
    timeout: float

    @property
    def name(self) -> str:
        return name_of(self.step)

    @property
    def temporary(self) -> Path:
        return self.checkpoints / f"{self.name}.tmp-{self.token}"


def write_part(plan: Plan, rank: int, snapshot: Snapshot) -> None:
    """Write one rank's file and its mark.

    Raises:
        SaveFailed: the disk is full, or the like, or a number is not finite: to go back to such a state would be of no
            use, and it must not take the place of a good one. What was written is gone, and the mark tells rank 0.
    """
    path = plan.temporary / f"rank-{rank:05d}.safetensors"
    mark = plan.temporary / f"rank-{rank:05d}.json"
    try:
        plan.temporary.mkdir(parents=True, exist_ok=True)
        if (poisoned := snapshot.not_finite()) is not None:
            raise SaveFailed(f"{poisoned} has numbers that are not finite")
        entry = write_file(path, [snapshot.header(), snapshot.data()])
        tensors: dict[str, dict[str, Any]] = {}
        for piece in snapshot.pieces:
            new = {"dtype": DTYPE_NAMES[piece.tensor.dtype], "shape": piece.shape, "slices": []}
            part = {"file": path.name, "key": key_of(piece), "start": piece.start, "stop": piece.stop}
            tensors.setdefault(piece.name, new)["slices"].append(part)
        write_json(mark, {"file": path.name, **entry.model_dump(), "tensors": tensors})
    except BaseException as error:
        path.unlink(missing_ok=True)
        number = (error.errno or 0) if isinstance(error, OSError) else 0
        with suppress(OSError):  # if a full disk lacks room even for a name, rank 0 waits until its timeout
            told = plan.temporary / f"told-{rank:05d}"  # by a full disk nothing: an empty file needs no block
            told.write_text(str(error) if isinstance(error, SaveFailed) else "", encoding="utf-8")
            told.replace(plan.temporary / f"rank-{rank:05d}.failed-{number}")
        if isinstance(error, OSError):
            raise SaveFailed(f"rank {rank}: {error}") from error
        raise


def publish(plan: Plan) -> None:
    """What rank 0 does after its own part.

    Raises:
        SaveFailed: a rank failed, or did not answer; nothing is left behind.
    """
    try:
        marks = _all_marks(plan)
        write_json(plan.temporary / INDEX, {**plan.about, "step": plan.step, **_merged(plan, marks)})
        for rank in range(plan.ranks):
            (plan.temporary / f"rank-{rank:05d}.json").unlink()
        sync_directory(plan.temporary)
        move_in(plan.temporary, plan.checkpoints / plan.name)
        for pointer in plan.pointers:
            point(plan.checkpoints, pointer, plan.name)
    except OSError as error:
        raise SaveFailed(f"rank 0: {error}") from error
    finally:
        shutil.rmtree(plan.temporary, ignore_errors=True)
    _forget_old(plan)


def _all_marks(plan: Plan) -> list[dict[str, Any]]:
    """By rank, once all ranks have ended their part; only then may what they wrote be removed."""
    deadline, pause = time.monotonic() + plan.timeout, POLL_SECONDS[0]
    marks: dict[int, dict[str, Any]] = {}
    failures: dict[int, str] = {}
    while True:
        for path in plan.temporary.glob("rank-*.failed-*"):
            rank, number = re.findall(r"\d+", path.name)
            told = os.strerror(int(number)) if int(number) else path.read_text(encoding="utf-8") or "see its error"
            failures[int(rank)] = f"rank {int(rank)}: {told}"
        late = sorted(set(range(plan.ranks)) - set(marks) - set(failures))
        for rank in late:
            path = plan.temporary / f"rank-{rank:05d}.json"
            if path.is_file():
                marks[rank] = json.loads(path.read_text(encoding="utf-8"))
        if len(marks) == plan.ranks:
            return [marks[rank] for rank in range(plan.ranks)]
        if len(marks) + len(failures) == plan.ranks:
            raise SaveFailed("; ".join(failures[rank] for rank in sorted(failures)))
        if time.monotonic() > deadline:
            raise SaveFailed(f"no sign of rank {', '.join(map(str, late[:8]))} within {plan.timeout:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS[1])


def _merged(plan: Plan, marks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The index's tensors and files; every file is of the size that its rank wrote."""
    files: dict[str, Any] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for mark in marks:
        entry = FileEntry(bytes=mark["bytes"], xxh3=mark["xxh3"])
        found = (plan.temporary / mark["file"]).stat().st_size
        if found != entry.bytes:
            raise OSError(f"{mark['file']} has {found:,} bytes, its rank wrote {entry.bytes:,}")
        files[mark["file"]] = entry.model_dump()
        for name, tensor in mark["tensors"].items():
            tensors.setdefault(name, {**tensor, "slices": []})["slices"] += tensor["slices"]
    return {"tensors": dict(sorted(tensors.items())), "files": files}


def move_in(temporary: Path, target: Path) -> None:
    """Give a whole directory its name; one that has it already gives way."""
    if target.exists():
        retire(target)
    temporary.rename(target)
    sync_directory(target.parent)


def retire(directory: Path) -> None:
    """Remove a checkpoint: first its name, so that no half of it is ever taken for one."""
    aside = directory.with_name(f"{directory.name}.tmp-old")
    shutil.rmtree(aside, ignore_errors=True)
    directory.rename(aside)
    shutil.rmtree(aside)


def point(checkpoints: Path, pointer: str, name: str) -> None:
    temporary = checkpoints / f"{pointer}.tmp-new"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(checkpoints / pointer)
    sync_directory(checkpoints)


def published(checkpoints: Path) -> list[str]:
    """Names of all checkpoints, the newest first."""
    names = (path.name for path in checkpoints.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir())
    return sorted(names, key=lambda name: int(name.removeprefix("step-")), reverse=True)


def clean(checkpoints: Path) -> list[str]:
    """Remove what saves that never ended have left; returns the names."""
    left = list(checkpoints.glob("*.tmp-*"))
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [path.name for path in left]


def set_aside(checkpoints: Path) -> None:
    """Rename the checkpoints of an earlier run to `<directory>.previous`, replacing what was set aside before.

    A run that starts afresh must neither mix with them nor delete the only copy of a night's work.
    """
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        previous = checkpoints.with_name(checkpoints.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        checkpoints.rename(previous)


def _forget_old(plan: Plan) -> None:
    """Keep the newest, counted from this one back, and what pointers name."""
    pinned = {pointed(plan.checkpoints, pointer) for pointer in (LATEST, BEST)}
    older = [name for name in published(plan.checkpoints) if int(name.removeprefix("step-")) <= plan.step]
    for name in older[plan.keep :]:
        if name not in pinned:
            retire(plan.checkpoints / name)
