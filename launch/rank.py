"""One rank of a many-host job, as launch/multihost.sh has it started on every host; not a command for people.

python launch/rank.py ASSIGNMENT    (megarec.launching.rank_process, as one word)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.launching.rank_process import Assignment, watch

if __name__ == "__main__":
    sys.exit(watch(Assignment.decode(sys.argv[-1])))
