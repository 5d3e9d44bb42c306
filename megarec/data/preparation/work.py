"""Work that survives kills: a directory of finished tasks, worker processes, and a progress line."""

import contextlib
import ctypes
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from megarec.errors import UserError
from megarec.files import write_whole
from megarec.ray_cluster import TasksLost

Task = TypeVar("Task")
Result = TypeVar("Result")
_PATIENCE = 60.0  # seconds for the processes of a killed preparation to end
_AHEAD = 16  # tasks under way a worker: behind a long one, such as the largest vocabulary, the others go on
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_AT_ONCE = 0.5  # seconds of a phase in which it picks up finished work: not used to measure speed
_RECENT = 60.0  # seconds by which speed is judged


class WorkerDied(UserError):
    """A worker was killed: finished work stays, and the same command goes on."""


@contextlib.contextmanager
def work_directory(output: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """The directory beside an output where finished tasks lie until the output is whole.

    Finished work of an earlier preparation stays, if it was stopped and had the same plan; else it is removed. At the
    end, and on an error, the directory is removed.

    Args:
        plan: what decides every byte of the tasks.

    Raises:
        UserError: another preparation writes the same output.
    """
    path = output.parent.absolute() / f".{output.name}.partial-work"
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plan, sort_keys=True).encode()
    with _alone(path, output):
        if not (path / "plan.json").is_file() or (path / "plan.json").read_bytes() != text:
            for inside in path.iterdir():
                shutil.rmtree(inside) if inside.is_dir() else inside.unlink()
            write_whole(path / "plan.json", text)
        try:
            yield path
        except (WorkerDied, TasksLost, KeyboardInterrupt, SystemExit):
            raise  # what is finished stays
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _alone(path: Path, output: Path) -> Iterator[None]:
    """Hold the directory itself locked; workers inherit the lock, so that it is free when all are gone."""
    descriptor = os.open(path, os.O_RDONLY)
    deadline = time.monotonic() + _PATIENCE
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"--output {output}: another preparation writes it; wait for it, or choose another directory"
                    ) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


class Workers:
    """Processes that carry out tasks; 1: this process does.

    Results come in the order of the tasks, so that the first error is the same however many workers there are.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self._count > 1:
            self._pool = ProcessPoolExecutor(
                self._count, multiprocessing.get_context("fork"), initializer=_begin, initargs=(os.getpid(),)
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=error[0] is None, cancel_futures=True)
            for process in processes if error[0] is not None else ():
                process.kill()
                process.join()

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """(task, what the function makes of it), in the order of the tasks.

        Raises:
            WorkerDied: a worker was killed.
        """
        if self._pool is None:
            for task in tasks:
                yield task, function(task)
            return
        waiting: deque[tuple[Task, Future[Result]]] = deque()
        try:
            for task in tasks:
                waiting.append((task, self._pool.submit(function, task)))
                if len(waiting) >= _AHEAD * self._count:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        except BrokenProcessPool as error:
            raise WorkerDied(
                f"one of {self._count} worker processes was killed (too little memory?); the same command goes on with "
                "what is left, fewer --workers need less memory"
            ) from error


def _begin(parent: int) -> None:
    """In a new worker: one thread, and an end with its parent, also by kill -9."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends them
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    pa.set_cpu_count(1)


class Progress:
    """A progress line of a preparation on standard error: on a terminal each second, else each half minute."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._printed = time.monotonic()
        self._shown = False

    def begin(self, what: str, total: float, later: float = 0.0) -> None:
        """Begin a phase.

        Args:
            total: of what `add` counts.
            later: time of all phases that follow, relative to this one, about.
        """
        self._what, self._total, self._later, self._done, self._rows = what, total or 1.0, later, 0.0, 0
        self._begun = time.monotonic()
        self._recent = deque([(self._begun, 0.0, 0)])

    def add(self, amount: float, rows: int = 0) -> None:
        """`amount` more of `total` is done, and `rows` more rows."""
        self._done, self._rows = self._done + amount, self._rows + rows
        now = time.monotonic()
        if now - self._begun < _AT_ONCE:
            self._recent.clear()
        while len(self._recent) > 1 and now - self._recent[1][0] > _RECENT:
            self._recent.popleft()
        self._recent.append((now, self._done, self._rows))
        if now - self._printed < (1 if self._terminal else 30):
            return
        self._printed, self._shown = now, True
        text = f"{self._what}: {self._done / self._total:4.0%}{self._speed()}"
        print(
            f"\r\033[K{text}" if self._terminal else text,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def _speed(self) -> str:
        """Rows a second and the time left, by recent work."""
        (start, done, rows), (end, done_now, rows_now) = self._recent[0], self._recent[-1]
        if end == start or done_now == done:
            return ""
        whole = (end - start) * self._total / (done_now - done)  # seconds of the phase
        left = whole * (1 - self._done / self._total + self._later)
        rate = f", {(rows_now - rows) / (end - start):,.0f} rows/s" if rows_now > rows else ""
        return f"{rate}, {_clock(left)} left"

    def end(self) -> None:
        if self._terminal and self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
