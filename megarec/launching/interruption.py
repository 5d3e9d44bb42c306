"""Signals that ask a whole job to end: the ranks save, and whoever watches them waits that long.

SIGTERM and SIGUSR1 are what schedulers and clouds send before they take a machine away (pre-emption).
"""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType

from megarec.launching import signalling
from megarec.launching.ssh import OPTIONS, on_host

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Inside of `with`, the first SIGTERM or SIGUSR1 to this process is noted instead of ending it.

    Attributes:
        signum: the signal, None before it came.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def __enter__(self) -> "Interruption":
        self._before = [signal.signal(number, self._note) for number in SIGNALS]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum

    @property
    def name(self) -> str:
        return signal.Signals(self.signum).name if self.signum else "no signal"


def signal_ranks(job: str, signum: int, hosts: Sequence[str] | None) -> list["subprocess.Popen[bytes]"]:
    """Start what sends a signal to a job's ranks: on this machine, or on hosts over ssh."""
    if hosts is None:
        return [subprocess.Popen([sys.executable, signalling.__file__, job, str(signum)])]
    source = Path(signalling.__file__).read_text(encoding="utf-8")
    remote = [sys.executable, "-c", source, job, str(signum)]
    return [subprocess.Popen(on_host(host, remote, OPTIONS), stdin=subprocess.DEVNULL) for host in hosts]
