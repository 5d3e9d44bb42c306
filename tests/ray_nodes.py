"""A Ray cluster of two nodes on this machine, and the end of one of them as by a power cut; tasks for it."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from megarec.distributed.rendezvous import free_port

_NODE = ("--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block")
# Nobody else is to come in; who connects has the token in the same variables.
AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
_QUICK = {  # to see that a node is dead: in a second or two, where a minute is usual
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_worker_niceness": "0",  # by default 15, which starves them on a busy machine
}


class TwoNodes:
    """A head and, once `complete`, another node, of one core each."""

    def __init__(self, directory: Path) -> None:
        ports = {name: free_port() for name in ("port", "dashboard-port", "ray-client-server-port")}
        self._directory, self.address = directory, f"127.0.0.1:{ports['port']}"
        self._head = self._start("--head", "--include-dashboard=false", *(f"--{n}={p}" for n, p in ports.items()))
        self._second: subprocess.Popen[str] | None = None

    def complete(self) -> None:
        """Have a second node, if there is none."""
        self._second = self._second or self._start(f"--address={self.address}")

    def kill_second(self) -> None:
        if self._second is not None:
            _kill(self._second)
        self._second = None

    def kill(self) -> None:
        """All of it."""
        _kill(self._head)
        self.kill_second()

    def _start(self, *options: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *_NODE, *options]
        environment = {**os.environ, **_QUICK, "RAY_TMPDIR": str(self._directory)}
        node = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert node.stdout is not None
        lines = []
        for line in node.stdout:
            lines.append(line)
            if "Ray runtime started" in line:
                return node
        raise AssertionError("".join(lines))


def _kill(node: "subprocess.Popen[str]") -> None:
    with suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
    node.wait()


@contextmanager
def two_nodes(directory: Path) -> Iterator[TwoNodes]:
    """A cluster that is gone after the block.

    Args:
        directory: for what Ray writes; its path must be short.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AUTHENTICATION.items():
            patch.setenv(name, value)
        cluster = TwoNodes(directory)
        try:
            yield cluster
        finally:
            cluster.kill()


def wait_for(directory: Path, pattern: str, count: int = 1, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while len(list(directory.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"{directory}: {[path.name for path in directory.iterdir()]}"
        time.sleep(0.01)


def held(task: tuple[Path, int]) -> int:
    """A task that ends when `go` is there, and leaves a file a start."""
    directory, number = task
    (directory / f"start-{number}-{os.getpid()}").touch()
    wait_for(directory, "go")
    return -number


def refuses(number: int) -> None:
    raise KeyError(number)
