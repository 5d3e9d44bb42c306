"""Signals that ask a whole job to end: the ranks save, and the process that watches them waits that long.

SIGTERM and SIGUSR1 are what schedulers and clouds send before they take a machine away (pre-emption).
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megarec.launching import send_signal
from megarec.launching.hosts import OPTIONS, on_ssh_host


def signal_ranks(job: str, signum: int, hosts: Sequence[str] | None) -> list["subprocess.Popen[bytes]"]:
    """Start what sends a signal to a job's ranks: on this machine, or on hosts over ssh."""
    if hosts is None:
        return [subprocess.Popen([sys.executable, send_signal.__file__, job, str(signum)])]
    source = Path(send_signal.__file__).read_text(encoding="utf-8")
    remote = [sys.executable, "-c", source, job, str(signum)]
    return [subprocess.Popen(on_ssh_host(host, remote, OPTIONS), stdin=subprocess.DEVNULL) for host in hosts]
