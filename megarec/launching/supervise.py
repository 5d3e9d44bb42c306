"""Run the launcher's processes, pass their lines on, and tell in the end what ended the job: the true cause, first."""

import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO

import psutil

from megarec.errors import USER_ERROR_EXIT
from megarec.launching.hostfile import Host
from megarec.launching.outcomes import Outcome, heard
from megarec.launching.trees import ended_with_this_process, kill_tree

GRACE_SECONDS = 3.0  # from the first failure until the others have said theirs, or are ended
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
    """What is known of a job's end.

    Attributes:
        outcomes: by rank, the first it told.
        host_codes: by host, the exit code of what ran there, where it is not 0.
    """

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    host_codes: dict[str, int] = field(default_factory=dict)
    launcher_code: int = 0

    def failed(self) -> bool:
        return bool(self.host_codes) or self.launcher_code != 0 or any(o.code for o in self.outcomes.values())

    def take(self, line: str, job: str) -> bool:
        """Whether a line of output is a word to the supervisor; if so, it is noted."""
        outcome = heard(line, job)
        if outcome is not None:
            self.outcomes.setdefault(outcome.rank, outcome)
            return True
        ended = _PDSH_EXIT.match(line)
        if ended is not None:
            self.host_codes.setdefault(ended["host"], int(ended["code"]))
        return ended is not None


def supervise(job: str, commands: list[Command]) -> Record:
    """Run the commands to the end of the job; when one host or rank fails, all are ended, at the latest after a grace.

    An end from here kills the launcher's processes of this machine; the ranks' watchers see their connection go.
    """
    record = Record()
    lines: Lines = queue.Queue()
    with _signals_as_exits():
        processes = [_start(command, lines) for command in commands]
        with ended_with_this_process([process.pid for process in processes]):
            try:
                _listen(job, commands, processes, lines, record)
            finally:
                # Not SIGTERM: DeepSpeed's launcher would answer it with a pkill by pattern on every host.
                # Not process groups: pdsh gives every ssh one of its own.
                for process in processes:
                    if process.poll() is None:
                        kill_tree(psutil.Process(process.pid))
                    process.wait()
    return record


def _listen(
    job: str, commands: list[Command], processes: list["subprocess.Popen[str]"], lines: Lines, record: Record
) -> None:
    """Pass lines on and note what happens until all is over, or the grace after the first failure is."""
    readers = 2 * len(processes)
    deadline: float | None = None
    while readers:
        with suppress(queue.Empty):
            item = lines.get(timeout=0.1)
            if item is None:
                readers -= 1
                continue
            line, stream = item
            if not record.take(line, job) and not _CHATTER.match(line):
                stream.write(line)
                stream.flush()
        _note_ends(commands, processes, record)
        if record.failed() or all(process.poll() is not None for process in processes):
            deadline = deadline or time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline:
                return
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    _note_ends(commands, processes, record)


@contextmanager
def _signals_as_exits() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process as an exception does, with what `finally` says."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda signum, frame: sys.exit(128 + signum)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


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


def verdict(record: Record, hosts: list[Host], addresses: dict[str, str]) -> tuple[int, list[str]]:
    """The job's exit code and what to say on standard error: the cause first, then what followed from it.

    Args:
        addresses: by host, to tell hosts for the addresses that libraries name.
    """
    world_size = sum(host.slots for host in hosts)
    if not record.failed() and len(record.outcomes) == world_size:
        return 0, []
    failures = [outcome for outcome in record.outcomes.values() if outcome.code]
    own = [outcome for outcome in failures if not outcome.lost]
    if own and all(outcome.code == USER_ERROR_EXIT for outcome in own):
        return USER_ERROR_EXIT, [f"error: {line}" for line in _grouped(own, hosts, addresses)]
    said = _grouped(own, hosts, addresses) + _of_hosts(record, hosts)
    said += _grouped([outcome for outcome in failures if outcome.lost], hosts, addresses)
    if not own:
        said += _silent(record, hosts)
    said = said or [f"the launcher ended with exit code {record.launcher_code} and no rank said why"]
    codes = [outcome.code for outcome in (*own, *failures)] + [*record.host_codes.values(), record.launcher_code]
    code = next((code for code in codes if 0 < code < 256), 1)
    return code, [f"error: {said[0]}", *(f"  then: {line}" for line in said[1:])]


def _grouped(outcomes: list[Outcome], hosts: list[Host], addresses: dict[str, str]) -> list[str]:
    """A line a cause, in the order in which they came in."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(_named(outcome.cause, hosts, addresses), []).append(outcome)
    world_size = sum(host.slots for host in hosts)
    return [_line(cause, outcomes, world_size) for cause, outcomes in groups.items()]


def _line(cause: str, outcomes: list[Outcome], world_size: int) -> str:
    if len(outcomes) == world_size > 1:
        return f"every rank: {cause}"
    by_host: dict[str, list[str]] = {}
    for outcome in sorted(outcomes, key=lambda o: o.rank):
        by_host.setdefault(outcome.host, []).append(str(outcome.rank))
    who = ", ".join(f"rank{'s' * (len(r) > 1)} {' and '.join(r)} on {host}" for host, r in by_host.items())
    return f"{who}: {cause}"


def _named(cause: str, hosts: list[Host], addresses: dict[str, str]) -> str:
    for host in hosts:
        address = addresses.get(host.name)
        if address:
            cause = re.sub(rf"(?<![\d.]){re.escape(address)}(?![\d.])", f"{host.name} ({host.ranks})", cause)
    return cause


def _of_hosts(record: Record, hosts: list[Host]) -> list[str]:
    """Hosts whose launcher or connection ended before any of their ranks told a thing."""
    ended = [host for host in hosts if host.name in record.host_codes and not _has_word(record, host)]
    return [f"{host.ranks} on {host.name}: no word; {_meaning(record.host_codes[host.name])}" for host in ended]


def _silent(record: Record, hosts: list[Host]) -> list[str]:
    """Hosts that were still there for the launcher, but whose ranks told nothing."""
    silent = [host for host in hosts if host.name not in record.host_codes and not _has_word(record, host)]
    return [f"{host.ranks} on {host.name}: no word; its link may be down, or its ranks hang" for host in silent]


def _has_word(record: Record, host: Host) -> bool:
    return any(rank in record.outcomes for rank in range(host.first_rank, host.first_rank + host.slots))


def _meaning(code: int) -> str:
    if code == 255:
        return "its ssh connection failed or was lost (exit code 255)"
    number = 256 - code if code > 192 else code - 128  # a launcher that ends with -9 shows as 247
    if 0 < number < 65:
        return f"its launcher ended with exit code {code} (signal {number})"
    return f"its launcher ended with exit code {code}"
