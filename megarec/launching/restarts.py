"""Start a job again from its latest checkpoint, up to K times, with a line each time."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megarec.checkpoint.pointers import LATEST, pointed
from megarec.errors import DONE, PREEMPTED, STOPPED, USER_MISTAKE, UserError
from megarec.signals import Interruption

NEVER_AGAIN = {
    DONE: "",
    USER_MISTAKE: "its user has to fix this",
    STOPPED: "the fault policy stopped it, and would again",
}


@dataclass(frozen=True)
class End:
    """How one start of a job ended: its exit code, and the cause in one line."""

    code: int
    cause: str


def run_with_restarts(
    start: Callable[[int, bool], End], restarts: int, resume: bool, checkpoints: Path, interruption: Interruption
) -> int:
    """Start a job, and again with --resume when it ends by a crash or a pre-emption; returns its last exit code.

    A signal to this process ends the job and the restarts: exit code 75 unless the job had ended by itself.

    Args:
        start: of the number of the start (from 0) and whether to resume; a UserError when it cannot be started.
        restarts: how many at most, in all.
        resume: whether the first start resumes.
        checkpoints: of the run; its `latest` shows whether a start made progress.
    """
    began = latest = _latest(checkpoints)
    end = start(0, resume)
    for number in range(1, restarts + 1):
        if interruption.signum is not None or end.code in NEVER_AGAIN:
            break
        before, latest = latest, _latest(checkpoints)
        # What the first start found there is not this run's, unless it was to resume or has written something itself.
        resume = resume or latest != began
        say(f"RESTART {number} OF {restarts}: {end.cause}; {_where_from(latest, before, resume)}")
        try:
            end = start(number, resume)
        except UserError as error:
            say(f"NOT RESTARTED: {error}")
            return end.code
    return _last_word(end, restarts, _latest(checkpoints), interruption)


def _where_from(latest: tuple[str, int] | None, before: tuple[str, int] | None, resume: bool) -> str:
    if latest is None or not resume:
        return "starting from scratch, as nothing was saved"
    stuck = ", the same as the last time: nothing newer was saved" if latest == before else ""
    return f"resuming from {latest[0]}{stuck}"


def _last_word(end: End, restarts: int, latest: tuple[str, int] | None, interruption: Interruption) -> int:
    there = f"{latest[0]} is the latest checkpoint" if latest else "there is no checkpoint"
    if interruption.signum is not None and end.code not in NEVER_AGAIN:
        saved = "" if end.code == PREEMPTED else f", before the ranks could say that they saved ({end.cause})"
        say(f"PRE-EMPTED: {interruption.name}{saved}; {there}; --resume goes on from there")
        return PREEMPTED
    if restarts and end.code not in NEVER_AGAIN:
        say(f"NOT RESTARTED: all {restarts} restarts are used up; {there}")
    elif restarts and NEVER_AGAIN[end.code]:
        say(f"NOT RESTARTED: exit code {end.code}: {NEVER_AGAIN[end.code]}")
    return end.code


def _latest(checkpoints: Path) -> tuple[str, int] | None:
    """Name of the latest checkpoint, and a mark that distinguishes it from one of the same name by another start."""
    name = pointed(checkpoints, LATEST)
    return None if name is None else (name, (checkpoints / LATEST).stat().st_mtime_ns)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
