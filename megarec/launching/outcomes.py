"""How ranks tell the launcher how they ended: a marked line on standard error that `supervise` takes out of the log."""

import json
import os
import re
import socket
import sys
from dataclasses import asdict, dataclass

JOB_VARIABLE = "MEGAREC_JOB"  # set in ranks that a supervisor listens to
_MARK = "@megarec"
_MARKED = re.compile(rf".*{_MARK} (?P<job>\w+) (?P<outcome>{{.*}})\s*")
_LONGEST = 2_000  # characters of a cause: a line is written whole, between those of other ranks, below 4 KiB


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        code: exit code, 0 for success.
        cause: one line; empty for success.
        lost: the rank only saw that others were gone or silent: a consequence, not the cause.
    """

    rank: int
    host: str
    code: int
    cause: str = ""
    lost: bool = False


def this_rank(code: int, cause: str, lost: bool = False) -> Outcome:
    return Outcome(
        int(os.environ.get("RANK", "0")), socket.gethostname(), code, " ".join(cause.split())[:_LONGEST], lost
    )


def tell(outcome: Outcome) -> None:
    """Write the line, in one piece."""
    line = f"{_MARK} {os.environ[JOB_VARIABLE]} {json.dumps(asdict(outcome))}\n"
    sys.stderr.flush()
    os.write(2, line.encode())


def heard(line: str, job: str) -> Outcome | None:
    """The outcome that a line of the job's output carries, or None."""
    match = _MARKED.fullmatch(line)
    if match is None or match["job"] != job:
        return None
    return Outcome(**json.loads(match["outcome"]))
