"""How ranks report their end to the launcher: a marked line on standard error that `supervise` takes out of the log.

The line says why the rank failed; if others failed first, no traceback hides their cause.
"""

import atexit
import json
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from megarec.errors import DONE, USER_MISTAKE, RunEnded, UserError, one_line
from megarec.files import parse_json

JOB_VARIABLE = "MEGAREC_JOB"  # set in ranks that a supervisor listens to
_MARK = "@megarec"
_MARKED = re.compile(rf".*{_MARK} (?P<job>\w+) (?P<outcome>{{.*}})\s*")
_LONGEST = 2_000  # characters of a cause: a line is written whole, between those of other ranks, below 4 KiB
FAILURE_EXIT = 1
_LATER = "import sys, time; time.sleep(3); sys.stderr.write(sys.argv[1]); sys.exit(int(sys.argv[2]))"
_PACKAGE = Path(__file__).parents[1]
_ADDRESS = r"\[?(?P<address>[0-9a-fA-F.:]+?)\]?:\d+"
# Messages of gloo, NCCL and torch.distributed's store about a lost peer, with the reason of the connection's end.
_GONE = re.compile(
    rf"(?:(?:Read|Write|writev?|readv?|SO_ERROR) ?(?:error)?|Connection closed by peer) \[?{_ADDRESS}"
    r"(?::? (?P<how>Connection \w+ by peer|Broken pipe|Connection timed out|No route to host))?",
)
_SILENT = re.compile(
    r"(?:Timed out waiting|wait timeout after) (?P<milliseconds>\d+) ?ms|Watchdog caught collective operation timeout"
)
# What torch's watchdog prints before it aborts a rank whose NCCL operation did not end: "[rank3]:[E1129 ...] ...".
_WATCHDOG = re.compile(
    r".*?\[rank(?P<rank>\d+)\]:.*Watchdog caught collective operation timeout: WorkNCCL\(SeqNum=(?P<number>\d+), "
    r"OpType=(?P<operation>\w+),.*\) ran for (?P<milliseconds>\d+) milliseconds"
)
_OTHER_LOSS = re.compile(
    r"Connection (?:reset|closed) by peer|Broken pipe|gloo/transport|DistNetworkError|remote process exited|"
    r"[Ff]ailed to recv, got 0 bytes|NCCL.*(?:remote|peer)"
)

# A failed kernel is reported by a later call, often far from it.
_OF_KERNEL = re.compile(r"device-side assert|illegal memory access|unspecified launch failure|misaligned address")
AGAIN = (
    "; the kernel that failed may be an earlier one: run again with CUDA_LAUNCH_BLOCKING=1 and "
    "FBGEMM_TBE_BOUNDS_CHECK_MODE=0, which show the kernel, and whether an id lies outside of its table"
)


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        code: exit code, 0 for success.
        cause: one line; empty for success.
        lost: the rank only noticed that others were gone or silent: a consequence, not the cause.
    """

    rank: int
    host: str
    code: int
    cause: str = ""
    lost: bool = False


def rank_number() -> int:
    """By the launcher's variable; 0 where that is not a number, which is another error."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def this_rank(code: int, cause: str, lost: bool = False) -> Outcome:
    return Outcome(rank_number(), socket.gethostname(), code, one_line(" ".join(cause.split()))[:_LONGEST], lost)


def report(outcome: Outcome) -> None:
    """Write the line, in one piece."""
    line = f"{_MARK} {os.environ[JOB_VARIABLE]} {json.dumps(asdict(outcome))}\n"
    sys.stderr.flush()
    os.write(2, line.encode())


def parse(line: str, job: str) -> Outcome | None:
    """The outcome that a line of the job's output carries, or None."""
    match = _MARKED.fullmatch(line)
    if match is None or match["job"] != job:
        return None
    try:
        return Outcome(**parse_json(match["outcome"], "a rank's last line"))
    except (UserError, TypeError):
        return None  # half a line, of a rank that was killed while it wrote


def watchdog_timeout(line: str) -> tuple[int, str] | None:
    """The rank whose NCCL operation did not end, by a line of its output, and what it waited for; None: another line.

    Such a rank is aborted by torch, though it only waited for others.
    """
    match = _WATCHDOG.match(line)
    if match is None:
        return None
    seconds, operation = int(match["milliseconds"]) / 1000, match["operation"].lower()
    cause = (
        f"no answer from other ranks for {seconds:.0f} s (parallel.timeout_seconds) in {operation} {match['number']}"
    )
    return int(match["rank"]), cause


@contextmanager
def reported() -> Iterator[None]:
    """Around a rank's work: a failure becomes one line with rank, host and cause, and ends the process at once.

    At once, because to shut an interpreter down with broken process groups and running threads can take long or hang.
    A user's mistake passes through, unless a supervisor collects the causes of all ranks.
    """
    try:
        yield
    except UserError as error:
        if JOB_VARIABLE not in os.environ:
            raise
        _end(this_rank(USER_MISTAKE, str(error)))
    except RunEnded as error:
        outcome = this_rank(error.code, str(error))
        if JOB_VARIABLE not in os.environ and outcome.rank == 0:
            print(str(error), file=sys.stderr)
        _end(outcome)
    except KeyboardInterrupt:
        outcome = this_rank(128 + signal.SIGINT, "interrupted by Ctrl-C; --resume goes on from the latest checkpoint")
        if outcome.rank == 0:
            print(outcome.cause, file=sys.stderr)
        _end(outcome)
    except Exception as error:
        outcome = outcome_of(error)
        if JOB_VARIABLE not in os.environ:
            print(f"error: rank {outcome.rank} on {outcome.host}: {outcome.cause}", file=sys.stderr)
        if not outcome.lost:
            traceback.print_exc()
        _end(outcome)


def outcome_of(error: Exception) -> Outcome:
    """This rank's outcome after an exception; a lost or silent peer is distinguished from its own fault."""
    text = " ".join(str(error).split())
    gone, silent = _GONE.search(text), _SILENT.search(text)
    place = _place(error)
    if silent:
        waited = f"{int(silent['milliseconds']) / 1000:g} s" if silent["milliseconds"] else "the timeout"
        cause = f"no answer from other ranks for {waited} (parallel.timeout_seconds) in {place}"
    elif gone:
        cause = f"lost the connection to {gone['address']} ({gone['how'] or 'closed by peer'}) in {place}"
    elif _OTHER_LOSS.search(f"{type(error).__name__}: {text}"):
        cause = f"lost the connection to another rank in {place}: {text}"
    else:
        again = AGAIN if _OF_KERNEL.search(text) else ""
        return this_rank(FAILURE_EXIT, f"{type(error).__name__}: {text[: _LONGEST // 2]} in {place}{again}")
    return this_rank(FAILURE_EXIT, cause, lost=True)


def _place(error: Exception) -> str:
    """The innermost line of this package that the exception came through: "sparse/exchange/ids.py:96"."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    callers = [frame for frame in ours if Path(frame.filename) != _PACKAGE / "distributed/collectives.py"]
    frame = (callers or ours or list(frames))[-1] if frames else None
    if frame is None:
        return "no known place"
    path = Path(frame.filename)
    return f"{path.relative_to(_PACKAGE) if ours else path}:{frame.lineno}"


def end_with_mistake(error: UserError) -> NoReturn:
    """One line and exit code 2, at once: an interpreter that shuts down while torch's threads run may abort.

    Every rank sees most mistakes, and rank 0 prints them. The others give the launcher time to end them first, as
    a program without threads: those of gloo would abort when rank 0 goes, and the launcher might take that exit code.
    """
    line = f"error: {error}\n"
    _flush()
    if rank_number() > 0:
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", _LATER, line, str(USER_MISTAKE)])
    os.write(2, line.encode(errors="replace"))
    os._exit(USER_MISTAKE)


def end_well() -> NoReturn:
    """Exit code 0 after registered exit handlers have run (a tracker's last upload, shared memory).

    The interpreter does not shut down: with threads of gloo that could abort a rank whose run succeeded, and the
    launcher would report its -6.
    """
    atexit._run_exitfuncs()
    _flush()
    os._exit(DONE)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()


def _end(outcome: Outcome) -> None:
    if JOB_VARIABLE in os.environ:
        report(outcome)
    _flush()
    os._exit(outcome.code)
