"""Run the launcher's processes, pass their lines on, and note how the job's ranks and hosts end."""

import dataclasses
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from megarec.errors import PREEMPTED, end_stream
from megarec.launching import send_signal
from megarec.launching.exit_report import Outcome, parse, watchdog_timeout
from megarec.launching.hosts import OPTIONS, on_ssh_host
from megarec.launching.process_tree import ended_with_this_process, kill_tree
from megarec.signals import Interruption

GRACE_SECONDS = 3.0  # from the first failure until the others have reported, or are ended
SIGNAL_AGAIN_SECONDS = 5.0  # ranks that were only starting when the signal came
_CHATTER = re.compile(r"(\S+: )?\[[^]]*\] \[(INFO|WARNING|ERROR)\] \[(launch|runner|real_accelerator)\.py:.*")
_PDSH_EXIT = re.compile(r"pdsh@\S+: (?P<host>\S+): ssh exited with exit code (?P<code>\d+)")
Lines = queue.Queue[tuple[str, IO[str]] | None]  # with the stream each goes to; None: one reader has ended


@dataclass(frozen=True)
class Command:
    """A launcher's process on this machine.

    Attributes:
        host: the only host it serves; None: all of them, and its lines begin with "HOST: " by themselves.
    """

    argv: list[str]
    environment: dict[str, str]
    host: str | None = None


@dataclass
class Record:
    """What is known about a job's end.

    Attributes:
        outcomes: by rank, the first that it reported.
        host_codes: by host, the exit code of what ran there, where it is not 0.
        waited: by rank, the operation that NCCL's watchdog reported as stuck; the watchdog then aborts the process.
    """

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    host_codes: dict[str, int] = field(default_factory=dict)
    launcher_code: int = 0
    waited: dict[int, str] = field(default_factory=dict)

    def preempted(self) -> bool:
        """Whether ranks were asked to end by a signal, which other ranks may still be saving for."""
        return any(outcome.code == PREEMPTED for outcome in self.outcomes.values())

    def failed(self) -> bool:
        return bool(self.host_codes) or self.launcher_code != 0 or any(o.code for o in self.outcomes.values())

    def take(self, line: str, job: str) -> bool:
        """Whether a line of output is a report to the supervisor; if so, it is noted."""
        outcome = parse(line, job)
        if outcome is not None:
            if outcome.rank in self.waited and outcome.code > 128:
                outcome = dataclasses.replace(outcome, cause=self.waited[outcome.rank], lost=True)
            self.outcomes.setdefault(outcome.rank, outcome)
            return True
        if (timeout := watchdog_timeout(line)) is not None:
            self.waited.setdefault(*timeout)
        ended = _PDSH_EXIT.match(line)
        if ended is not None:
            self.host_codes.setdefault(ended["host"], int(ended["code"]))
        return ended is not None


@dataclass(frozen=True)
class Watch:
    """What ends a job besides its ranks.

    Attributes:
        interruption: notes signals to this process, which then go to the ranks.
        hosts: where the ranks are; None: on this machine.
        grace: seconds that ranks have to save after a signal.
    """

    interruption: Interruption
    hosts: list[str] | None = None
    grace: float = 60.0


def supervise(job: str, commands: list[Command], watch: Watch) -> Record:
    """Run the commands to the end of the job; when one host or rank fails, all are ended, at the latest after a grace.

    Ending kills the launcher's processes on this machine; the ranks' watchers see their connection close.
    """
    record = Record()
    lines: Lines = queue.Queue()
    with _hangup_as_exit():
        processes = [_start(command, lines) for command in commands]
        with ended_with_this_process([process.pid for process in processes]):
            try:
                _listen(job, commands, processes, lines, record, watch)
            finally:
                # Not SIGTERM: DeepSpeed's launcher would answer it with a pkill by pattern on every host.
                # Not process groups: pdsh gives every ssh one of its own.
                for process in processes:
                    if process.poll() is None:
                        kill_tree(psutil.Process(process.pid))
                    process.wait()
    return record


def _listen(
    job: str,
    commands: list[Command],
    processes: list["subprocess.Popen[str]"],
    lines: Lines,
    record: Record,
    watch: Watch,
) -> None:
    """Pass lines on and note what happens until all is over, or the grace after the first failure or a signal is."""
    readers = 2 * len(processes)
    deadline: float | None = None
    with _Forwarding(job, watch) as forwarding:
        while readers:
            with suppress(queue.Empty):
                item = lines.get(timeout=0.1)
                if item is None:
                    readers -= 1
                    continue
                line, stream = item
                if not record.take(line, job) and not _CHATTER.match(line):
                    _pass_on(line, stream)
            _note_ends(commands, processes, record)
            signalled = forwarding.signalled()
            if signalled or record.failed() or all(process.poll() is not None for process in processes):
                grace = watch.grace if signalled or record.preempted() else GRACE_SECONDS
                deadline = deadline or time.monotonic() + grace
                if time.monotonic() > deadline:
                    return
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    _note_ends(commands, processes, record)


def _pass_on(line: str, stream: IO[str]) -> None:
    """Write a line of the job; a closed output (`| head`) or a full disk does not end the job."""
    try:
        stream.write(line)
        stream.flush()
    except OSError:
        end_stream(stream)


class _Forwarding:
    """Passes a signal to this process on to the ranks, and repeats it while they run."""

    def __init__(self, job: str, watch: Watch) -> None:
        self._job, self._watch = job, watch
        self._senders: list[subprocess.Popen[bytes]] = []
        self._next = 0.0

    def __enter__(self) -> "_Forwarding":
        return self

    def __exit__(self, *_: object) -> None:
        for sender in self._senders:
            sender.kill()
            sender.wait()

    def signalled(self) -> bool:
        """Whether there was a signal; passes it on when it is due."""
        number = self._watch.interruption.signum
        if number is not None and time.monotonic() > self._next:
            self._next = time.monotonic() + SIGNAL_AGAIN_SECONDS
            self._senders = [sender for sender in self._senders if sender.poll() is None]
            self._senders += signal_ranks(self._job, number, self._watch.hosts)
        return number is not None


@contextmanager
def _hangup_as_exit() -> Iterator[None]:
    """SIGHUP raises an exception in this process, so that `finally` runs; if ignored (nohup), it stays ignored."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGHUP, lambda signum, frame: sys.exit(128 + signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _start(command: Command, lines: Lines) -> "subprocess.Popen[str]":
    # "/": DeepSpeed's launcher names its working directory to a shell unquoted; ranks change to their own.
    process = subprocess.Popen(
        command.argv,
        env=command.environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    prefix = f"{command.host}: " if command.host else ""

    def read(source: IO[str], target: IO[str]) -> None:
        for line in source:
            lines.put((prefix + line, target))
        lines.put(None)

    for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        assert source is not None
        threading.Thread(target=read, args=(source, target), daemon=True).start()
    return process


def _note_ends(commands: list[Command], processes: list["subprocess.Popen[str]"], record: Record) -> None:
    for command, process in zip(commands, processes, strict=True):
        code = process.poll()
        if code:
            if command.host is not None:
                record.host_codes.setdefault(command.host, code)
            record.launcher_code = record.launcher_code or code


def signal_ranks(job: str, signum: int, hosts: Sequence[str] | None) -> list["subprocess.Popen[bytes]"]:
    """Start the senders of a signal to a job's ranks: on this machine, or on hosts over ssh."""
    if hosts is None:
        return [subprocess.Popen([sys.executable, send_signal.__file__, job, str(signum)])]
    source = Path(send_signal.__file__).read_text(encoding="utf-8")
    remote = [sys.executable, "-P", "-c", source, job, str(signum)]
    return [subprocess.Popen(on_ssh_host(host, remote, OPTIONS), stdin=subprocess.DEVNULL) for host in hosts]
