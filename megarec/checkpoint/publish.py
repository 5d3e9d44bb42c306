"""From every rank's file to a published checkpoint; the ranks meet in files, never in a collective.

    each rank   writes its file into <name>.tmp-<token>/, then a mark with its size, checksum and slices
    rank 0      waits for all marks, checks sizes, writes index.json, renames the directory, then moves the pointers

A kill at any moment leaves whole checkpoints, pointers to whole checkpoints, and directories *.tmp-* that the next
start removes. (Between two renames of a step that is saved again, the old checkpoint has the name <name>.tmp-old; the
next start gives it back its own.) The file system must be shared by all hosts, with a rename that is atomic (POSIX).
"""

import logging
import os
import re
import shutil
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarec.checkpoint.format import DTYPE_NAMES, INDEX, FileEntry, sealed
from megarec.checkpoint.pointers import BEST, LATEST, NAME, name_of, pointed
from megarec.checkpoint.snapshot import Snapshot
from megarec.checkpoint.writing import key_of, write_file
from megarec.errors import one_line
from megarec.files import read_object, sync_directory, write_json, write_whole

POLL_SECONDS = 0.01, 0.2  # between checks for the other ranks' marks: at first, at most
GRACE_SECONDS = 10.0  # after a failure, for ranks that have not begun: they may have had no room for a mark
OLD, GONE = ".tmp-old", ".tmp-gone"  # a whole checkpoint that another one replaces; one that is being removed
SPARE = "spare"  # an empty file for a rank that finds no room for one of its own

_log = logging.getLogger(__name__)


class SaveFailed(Exception):
    """A checkpoint was not published; the run goes on."""


@dataclass(frozen=True)
class Plan:
    """One save, the same on every rank.

    Attributes:
        checkpoints: the directory of all checkpoints.
        step: of the run; names the checkpoint.
        token: makes this save's temporary directory unique among saves and jobs.
        ranks: how many write.
        about: index.json without tensors and files.
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
        SaveFailed: the disk is full, any other error, or a number is not finite: to go back to such a state
            would be of no use, and it must not take the place of a good one. What was written is gone, and the mark
            tells rank 0.
    """
    path = plan.temporary / f"rank-{rank:05d}.safetensors"
    mark = plan.temporary / f"rank-{rank:05d}.json"
    try:
        plan.temporary.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            (plan.temporary / SPARE).touch()
        if (poisoned := snapshot.not_finite()) is not None:
            raise SaveFailed(f"{poisoned} has numbers that are not finite")
        entry = write_file(path, [snapshot.header(), snapshot.data()])
        tensors: dict[str, dict[str, Any]] = {}
        for piece in snapshot.pieces:
            new = {"dtype": DTYPE_NAMES[piece.tensor.dtype], "shape": piece.shape, "slices": []}
            part = {"file": path.name, "key": key_of(piece), "start": piece.start, "stop": piece.stop}
            tensors.setdefault(piece.name, new)["slices"].append(part)
        write_json(mark, {"file": path.name, **entry.model_dump(), "tensors": tensors})
    except SaveFailed as error:
        _report(plan, rank, error)
        raise
    except Exception as error:
        _report(plan, rank, error)
        raise SaveFailed(f"rank {rank}: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """One line; errors other than the disk's have their type and place in the code, as there is no traceback."""
    if isinstance(error, OSError | SaveFailed):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return one_line(f"{type(error).__name__}: {error} in {Path(place.filename).name}:{place.lineno}", most=500)


def _report(plan: Plan, rank: int, error: Exception) -> None:
    """Remove what a rank wrote, and leave a mark that tells rank 0: an empty file, which needs no block of a full disk.

    Without room even for a name no mark is left; rank 0 then gives up after its timeout, or GRACE_SECONDS after the
    failure of another rank.
    """
    mark = plan.temporary / f"mark-{rank:05d}"
    number = (error.errno or 0) if isinstance(error, OSError) else 0
    with suppress(OSError):
        (plan.temporary / f"rank-{rank:05d}.safetensors").unlink(missing_ok=True)
    with suppress(OSError):
        try:
            mark.write_text("" if number else _cause(error), encoding="utf-8")
        except OSError:
            mark = plan.temporary / SPARE
        mark.replace(plan.temporary / f"rank-{rank:05d}.failed-{number}")


class OtherParts:
    """Outcomes that ranks reported by a collective: rank 0 must not wait for marks that cannot come.

    Attributes:
        ended: every rank has ended its part, so that marks are there, or never will be.
        failures: by rank, why its part failed.
    """

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.failures: dict[int, str] = {}


def publish(plan: Plan, failure: SaveFailed | None = None, others: OtherParts | None = None) -> None:
    """What rank 0 does after its own part. A warning is logged where an older checkpoint could not be removed.

    Args:
        failure: of rank 0's own part; then the others are only waited for.
        others: filled in as soon as all ranks know that their parts have ended.

    Raises:
        SaveFailed: a rank failed, for any reason, or did not answer; nothing is left behind.
    """
    try:
        if failure is not None and not plan.temporary.is_dir():
            raise failure  # there is no place where the other ranks could leave a mark
        marks = _all_marks(plan, failure, others or OtherParts())
        write_whole(plan.temporary / INDEX, sealed({**plan.about, "step": plan.step, **_merged(plan, marks)}))
        for name in (SPARE, *(f"rank-{rank:05d}.json" for rank in range(plan.ranks))):
            (plan.temporary / name).unlink(missing_ok=True)
        sync_directory(plan.temporary)
        move_in(plan.temporary, plan.checkpoints / plan.name)
        for pointer in plan.pointers:
            point(plan.checkpoints, pointer, plan.name)
    except SaveFailed:
        raise
    except Exception as error:
        raise SaveFailed(f"rank 0: {_cause(error)}") from error
    finally:
        shutil.rmtree(plan.temporary, ignore_errors=True)
    try:
        _forget_old(plan)
    except Exception as error:
        _log.warning("an older checkpoint could not be removed (%s); the next save or start tries again", _cause(error))


def _all_marks(plan: Plan, failure: SaveFailed | None, others: OtherParts) -> list[dict[str, Any]]:
    """By rank, once all ranks have ended their part; only then may what they wrote be removed."""
    began, pause = time.monotonic(), POLL_SECONDS[0]
    heard = began  # when a rank that is still late was last known to be at work
    marks: dict[int, dict[str, Any]] = {}
    failures = {0: str(failure)} if failure is not None else {}
    while True:
        if others.ended.is_set():
            failures |= {rank: f"rank {rank}: {text}" for rank, text in others.failures.items() if rank not in failures}
        failures |= _reported_failures(plan)
        late = sorted(set(range(plan.ranks)) - set(marks) - set(failures))
        for rank in late:
            path = plan.temporary / f"rank-{rank:05d}.json"
            if path.is_file():
                marks[rank] = read_object(path, "the mark of a rank")
        if len(marks) == plan.ranks:
            return [marks[rank] for rank in range(plan.ranks)]
        reasons = [failures[rank] for rank in sorted(failures)]
        if not plan.temporary.is_dir():
            raise SaveFailed(
                "; ".join([*reasons, f"{plan.temporary} is gone: removed or renamed while it was written"])
            )
        if len(marks.keys() | failures.keys()) == plan.ranks:
            raise SaveFailed("; ".join(reasons))
        now = time.monotonic()
        writing = any((plan.temporary / f"rank-{rank:05d}.safetensors").exists() for rank in late)
        if not others.ended.is_set() and (writing or not failures):
            heard = now
        if now > min(began + plan.timeout, heard + GRACE_SECONDS):
            reasons.append(f"no sign of rank {', '.join(map(str, late[:8]))} within {now - began:.0f} s")
            raise SaveFailed("; ".join(reasons))
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS[1])


def _reported_failures(plan: Plan) -> dict[int, str]:
    """By rank, the causes in the marks of failed ranks."""
    failures = {}
    for path in plan.temporary.glob("rank-*.failed-*"):
        rank, number = map(int, re.findall(r"\d+", path.name))
        cause = os.strerror(number) if number else path.read_text(encoding="utf-8") or "see its error"
        failures[rank] = f"rank {rank}: {cause}"
    return failures


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
    """Give a whole directory its name; one that has it already is whole, and stays as <name>.tmp-old, until then."""
    old = target.with_name(target.name + OLD)
    if target.exists():
        if old.exists():
            retire(old)
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync_directory(target.parent)


def retire(directory: Path) -> None:
    """Remove a checkpoint: first its name, so that a half-removed one is never taken for a checkpoint."""
    gone = directory.with_name(directory.name + GONE)
    shutil.rmtree(gone, ignore_errors=True)
    directory.rename(gone)
    shutil.rmtree(gone)


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


def clean(checkpoints: Path) -> None:
    """Remove leftovers of unfinished saves, and give a checkpoint that one of them moved its name back.

    What cannot be removed is a warning: it must not keep a run from starting.
    """
    for path in sorted(checkpoints.glob("*.tmp-*")):
        target = path.with_name(path.name.removesuffix(OLD))
        try:
            if NAME.fullmatch(target.name) and not target.exists():
                path.rename(target)
                _log.info("%s has its name back, after a save that never ended", target)
            else:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                _log.info("removed %s, left by a save that never ended", path)
        except OSError as error:
            _log.warning("%s, left by a save that never ended, could not be removed (%s)", path, error)


def _forget_old(plan: Plan) -> None:
    """Keep the newest, counted from this one back, and what pointers name; not what this one replaced."""
    replaced = plan.checkpoints / (plan.name + OLD)
    if replaced.exists():
        retire(replaced)
    pinned = {pointed(plan.checkpoints, pointer) for pointer in (LATEST, BEST)}
    older = [name for name in published(plan.checkpoints) if int(name.removeprefix("step-")) <= plan.step]
    for name in older[plan.keep :]:
        if name not in pinned:
            retire(plan.checkpoints / name)
