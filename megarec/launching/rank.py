"""One rank of a watched job, as our launchers have it started on every host; not a command for people.

python megarec/launching/rank.py ASSIGNMENT    (megarec.launching.rank_process, as one word)
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # not this directory, whose modules are no top-level ones
    from megarec.launching.rank_process import Assignment, watch

    sys.exit(watch(Assignment.decode(sys.argv[-1])))
