"""End processes with all their descendants, also when this process itself is killed.

Run as a program by `ended_with_this_process`: `python process_tree.py PID...` ends them when its standard
input is closed.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


def kill_tree(root: psutil.Process) -> None:
    """Kill a process and what it started, sessions and groups of their own included; fine if it has ended."""
    with suppress(psutil.NoSuchProcess):
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def ended_with_this_process(pids: list[int]) -> Iterator[None]:
    """While inside, the processes and their descendants end when this one does, however that happens."""
    command = [sys.executable, __file__, *map(str, pids)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            yield
        finally:
            guard.kill()


def main() -> None:
    roots = [psutil.Process(int(pid)) for pid in sys.argv[1:] if psutil.pid_exists(int(pid))]
    sys.stdin.read()
    for root in roots:
        kill_tree(root)


if __name__ == "__main__":
    main()
