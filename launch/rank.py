"""One rank of a watched job: megarec/launching/rank.py under its earlier path.

python launch/rank.py ASSIGNMENT    (megarec.launching.rank_process, as one word)
"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "megarec/launching/rank.py"), run_name="__main__")
