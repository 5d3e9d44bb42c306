"""Send a signal to the ranks of a job on this host: python send_signal.py JOB SIGNUM.

Over ssh it goes as source: standard library only. A rank is distinguished from its own child processes, which have
its variables as well, by its parent, the watcher, which does not have them.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path


def ranks(job: str) -> list[int]:
    """Process ids of a job's ranks on this host."""
    mark = f"MEGAREC_JOB={job}".encode()
    marked = {int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if mark in _content(path)}
    return sorted(pid for pid in marked if _parent(pid) not in marked)


def _content(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\0")
    except OSError:
        return []  # it has ended, or belongs to another user


def _parent(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])


def main() -> None:
    job, number = sys.argv[1], int(sys.argv[2])
    for pid in ranks(job):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, number)


if __name__ == "__main__":
    main()
