"""The directory of a run, train.output_dir: one run at a time writes there, and a new one moves the earlier one aside.

The owner holds an flock on `.owner`, whose text names its host and process. The kernel drops the lock when that process
ends, however it ends; a leftover file means nothing by itself. Over NFS the server keeps the lock for all
hosts (NFS 4, or 3 with lockd). A file system without locks gives a warning, and two runs there are not separated.
"""

import errno
import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist

from megarec.checkpoint.publish import clean
from megarec.config.sections import RunConfig
from megarec.distributed.collectives import raise_together
from megarec.distributed.topology import ONE_RANK, Topology
from megarec.errors import UserError
from megarec.files import parse_json, sync_directory

OWNER_FILE = ".owner"
PATIENCE_SECONDS = 5.0  # for the ranks of a start that was killed, which may still be ending
PARTS = ("config.json", "metrics.json", "log.txt", "tensorboard", "trace", "checkpoints")
CSV_EVIDENCE = "csv/train_logloss.csv"  # a `csv` without it may be the user's own
PREVIOUS = "previous"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def check_outputs(config: RunConfig) -> None:
    """Check that a run may write where it is asked to, before anything is built; nothing is left there.

    Raises:
        UserError: a file in a directory's place, no permission, a file system without files.
    """
    _check_directory("train.output_dir", config.train.output_dir)
    for key in ("tensorboard", "csv_monitor"):
        given = config.deepspeed.get(key, {})
        if given.get("enabled", key == "tensorboard"):
            path = Path(given.get("output_path", config.train.output_dir), given.get("job_name", key))
            _check_directory(f"deepspeed.{key}.output_path", str(path))


def _check_directory(key: str, path: str) -> None:
    """Whether a directory can be made and written, or is there and can be; nothing is left behind.

    Args:
        key: of the config, for the message.

    Raises:
        UserError: it cannot.
    """
    try:
        found = Path(path)
        while not _is_there(found):
            found = found.parent
        if found.exists() and not found.is_dir():
            raise NotADirectoryError(0, f"{found} is a file")
        with tempfile.TemporaryFile(dir=found):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{key}={path!r}: cannot be written ({reason}); expected a directory to write in") from None


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True  # or an OSError: a name that is too long, a file among the parents


@contextmanager
def only_run_in(output: Path, device: torch.device) -> Iterator[str | None]:
    """Own the directory; collective. Yields, on rank 0, what to warn of, if anything.

    A directory made here is removed at the end if nothing was written to it.

    Raises:
        UserError: another run owns it, or it cannot be written; on every rank.
    """
    everyone = _all_ranks()
    lock, problem = None, None
    if everyone.rank == 0:
        try:
            lock = _Lock(output)
        except UserError as error:
            problem = error
    raise_together(problem, everyone, device)
    try:
        yield None if lock is None else lock.remark
    finally:
        if lock is not None:
            lock.release()


def _all_ranks() -> Topology:
    """The job before its hosts and groups are known."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ONE_RANK
    return Topology(dist.get_rank(), dist.get_world_size(), 1, 1, world=dist.group.WORLD)


class _Lock:
    """Held from its making to `release`.

    Attributes:
        remark: what is wrong with the lock, None if nothing is.
    """

    def __init__(self, output: Path) -> None:
        self.remark: str | None = None
        self._path = output / OWNER_FILE
        self._made = [path for path in (output, *output.parents) if not path.exists()]
        try:
            output.mkdir(parents=True, exist_ok=True)
            self._file = self._acquired(time.monotonic() + PATIENCE_SECONDS)
            me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, (json.dumps(me) + "\n").encode(), 0)
        except OSError as error:
            raise UserError(
                f"train.output_dir={str(output)!r}: {OWNER_FILE} cannot be written there ({error.strerror}); "
                "expected a directory that this user may write"
            ) from None

    def _acquired(self, deadline: float) -> int:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(file, self._path):  # else its owner removed it between our opening and locking
                    return file
            except BlockingIOError:
                if time.monotonic() > deadline:
                    owner = _owner(file)
                    os.close(file)
                    raise UserError(
                        f"train.output_dir={str(self._path.parent)!r}: {owner} trains there; wait for it or end "
                        "it, or choose another train.output_dir"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(file)
                    raise
                self.remark = (
                    f"{self._path.parent}: this file system has no locks ({error.strerror}): start no other run there "
                    "while this one trains, nothing would stop it"
                )
                return file
            os.close(file)

    def release(self) -> None:
        """Release the directory, and remove the lock file."""
        with suppress(OSError):
            self._path.unlink()
            for directory in self._made:
                directory.rmdir()  # refused where something was written
        os.close(self._file)


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _owner(file: int) -> str:
    """As its file names it; a file system may show the text later than the lock."""
    try:
        found = parse_json(os.pread(file, 4096, 0), "its owner")
        return f"process {int(found['pid'])} on host {str(found['host'])!r} (since {str(found['since'])!r})"
    except (ValueError, TypeError, KeyError):
        return "another run, which has not given its name,"


def set_aside(output: Path) -> Path | None:
    """Move what an earlier run wrote to `previous` in the same directory, or to `previous-2` and so on.

    A new run must neither mix with it nor delete it. Runs set aside before stay.
    `previous` is a run's directory in its own right: tools take it as they take `output`.

    Returns:
        Where it is now; None: there was nothing.

    Raises:
        UserError: it cannot be moved.
    """
    clean(output / "checkpoints")
    found = [path for name in PARTS if _holds_a_file(path := output / name)]
    if (output / CSV_EVIDENCE).is_file():
        found.append(output / "csv")
    if not found:
        return None
    return move_to_previous(
        output,
        found,
        f"train.output_dir={str(output)!r}",
        "choose another train.output_dir, or continue it with --resume",
    )


def move_to_previous(output: Path, found: Sequence[Path], what: str, remedy: str) -> Path:
    """Move what an earlier run or sweep has in `output` to `previous` there, or to `previous-2` and so on.

    Args:
        what, remedy: begin and end of the message where it cannot be moved.

    Raises:
        UserError: it cannot.
    """
    names = (PREVIOUS + (f"-{number}" if number > 1 else "") for number in count(1))
    previous = next(path for path in map(output.joinpath, names) if not path.exists())
    try:
        previous.mkdir()
        for path in found:
            path.rename(previous / path.name)
        sync_directory(output)
    except OSError as error:
        raise UserError(
            f"{what} cannot be moved to {previous.name} ({error.strerror}: {error.filename}); {remedy}"
        ) from None
    return previous


def _holds_a_file(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(inside.is_file() for inside in path.rglob("*")))
