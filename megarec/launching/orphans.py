"""A rank whose launcher is gone saves and ends, instead of training on unwatched.

DeepSpeed's `deepspeed` starts a second process, which starts the ranks. SIGTERM or a kill ends the first alone, and the
others never notice. A rank under our own launchers has a watcher process that notices (rank_process.py).
"""

import os
import signal
import threading
import time
from contextlib import suppress

import psutil

from megarec.launching.exit_report import JOB_VARIABLE

_LAUNCHERS = (
    "deepspeed.launcher",
    "bin/deepspeed",
    "bin/torchrun",
    "torch.distributed.run",
    "torch/distributed/run.py",
)
_POLL_SECONDS = 1.0


def end_without_launcher() -> None:
    """From now on this process gets SIGTERM when a launcher that started it has ended."""
    if "RANK" not in os.environ or JOB_VARIABLE in os.environ:
        return
    launchers = launchers_of(psutil.Process())
    if launchers:
        threading.Thread(target=_watch, args=(launchers,), name="launcher", daemon=True).start()


def launchers_of(process: psutil.Process) -> list[psutil.Process]:
    """The unbroken line of launchers above a process, the nearest first."""
    found = []
    for parent in process.parents():
        with suppress(psutil.Error):
            if any(mark in word for word in parent.cmdline()[:5] for mark in _LAUNCHERS):
                found.append(parent)
                continue
        break
    return found


def _watch(launchers: list[psutil.Process]) -> None:
    """SIGTERM to this process once one of them is gone: the trainer notes it, and all ranks save after the step."""
    while all(_alive(launcher) for launcher in launchers):
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _alive(process: psutil.Process) -> bool:
    """A zombie is not alive: its exit code may never be collected."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
