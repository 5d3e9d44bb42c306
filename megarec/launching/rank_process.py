"""A small process beside every rank of a many-host job: it notices how the rank ended, and ends it when needed.

It reports when a signal killed the rank, which launchers of whole hosts do not, with the rank's own exit code. It
ends the rank when the launcher dies, or no longer reads its output, because the ssh connection is gone: so nothing runs
on unwatched on a host. SIGTERM and SIGUSR1 are passed on to the rank, which gets time to save.

Plain standard library: a rank of every job carries this process.

Each rank gets its `Assignment` as one word that no shell and no launcher can change: launchers
build remote command lines by joining words (DeepSpeed's pdsh runner leaves `$`, quotes and semicolons as they are), so
user input (paths and overrides) travels in URL-safe base64.
"""

import base64
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from megarec.errors import PREEMPTED, STOPPED
from megarec.launching.exit_report import JOB_VARIABLE, report, this_rank
from megarec.launching.variables import read_variables
from megarec.signals import SIGNALS

GRACE_SECONDS = 3.0
_CAUSES = {
    PREEMPTED: f"asked to end by a signal, and saved (exit code {PREEMPTED})",
    STOPPED: f"stopped by the fault policy (exit code {STOPPED})",
}
_PR_SET_PDEATHSIG = 1
_NODE_VARIABLES = ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID")  # DeepSpeed, torchrun, Slurm
_INFINIBAND = Path("/sys/class/infiniband")  # empty or absent where there is none


@dataclass(frozen=True)
class Assignment:
    """Attributes:
    job: an id of this start of the job.
    directory: the working directory on every host.
    command: what the Python interpreter of the rank runs: a script and its arguments.
    environment: variables of every rank, for all to see; those of .deepspeed_env travel apart (variables.py).
    interfaces: by node, the network interface that reaches the others.
    grace: seconds that a rank has to save when it is asked to end.
    """

    job: str
    directory: str
    command: list[str]
    environment: dict[str, str]
    interfaces: list[str]
    grace: float = 60.0

    def encode(self) -> str:
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    @staticmethod
    def decode(word: str) -> "Assignment":
        return Assignment(**json.loads(base64.urlsafe_b64decode(word)))


def watch(assignment: Assignment) -> int:
    """Run the rank to its end; returns its exit code, 128 + the signal that killed it."""
    die_with_parent(signal.SIGUSR2)  # not SIGHUP, which nohup ignores
    os.environ[JOB_VARIABLE] = assignment.job
    out_of_memory = _out_of_memory_kills()
    rank = subprocess.Popen(
        [sys.executable, "-u", *assignment.command],
        cwd=assignment.directory,
        env=_environment(assignment),
        preexec_fn=lambda: die_with_parent(signal.SIGKILL),
    )
    asked, unwatched = threading.Event(), threading.Event()

    def kill_after(seconds: float) -> None:
        timer = threading.Timer(seconds, rank.kill)
        timer.daemon = True
        timer.start()

    def ask(signum: int, frame: FrameType | None) -> None:
        asked.set()
        rank.send_signal(signum)
        kill_after(assignment.grace)

    def end(signum: int = 0, frame: FrameType | None = None) -> None:
        unwatched.set()
        rank.terminate()
        kill_after(GRACE_SECONDS)

    for number in SIGNALS:
        signal.signal(number, ask)
    for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
    threading.Thread(target=_when_unread, args=(end,), daemon=True).start()
    code = rank.wait()
    if unwatched.is_set() or (asked.is_set() and code < 0):
        os._exit(128 + signal.SIGTERM)  # not its own end: it has nothing to report, and perhaps no listener
    if code < 0:
        name = signal.Signals(-code).name
        hint = (
            "; the kernel's out-of-memory killer struck on this host" if _out_of_memory_kills() > out_of_memory else ""
        )
        report(this_rank(128 - code, f"killed by signal {-code} ({name}){hint}"))
        return 128 - code
    report(this_rank(code, _CAUSES.get(code, f"exit code {code}") if code else ""))
    return code


def die_with_parent(signum: int) -> None:
    """Ask the kernel for a signal to this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signum))


def _environment(assignment: Assignment) -> dict[str, str]:
    node = int(next(os.environ[name] for name in _NODE_VARIABLES if name in os.environ))
    interface = assignment.interfaces[node]
    found = {"GLOO_SOCKET_IFNAME": interface}
    # The way to the master may be a slow management network: NCCL finds InfiniBand by itself, and the user's setting
    # wins.
    if not (_INFINIBAND.is_dir() and any(_INFINIBAND.iterdir())):
        found["NCCL_SOCKET_IFNAME"] = os.environ.get("NCCL_SOCKET_IFNAME", interface)
    return {**os.environ, **found, **assignment.environment, **read_variables(assignment.job)}


def _when_unread(end: Callable[[], None]) -> None:
    """Call `end` when the other end of standard output is closed; a file or a terminal never is."""
    poll = select.poll()
    poll.register(1, 0)  # errors and hang-ups are always reported
    poll.poll()
    end()


def _out_of_memory_kills() -> int:
    """So far, on this host; 0 where the kernel does not count them."""
    try:
        with Path("/proc/vmstat").open() as counters:
            return next((int(line.split()[1]) for line in counters if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0
