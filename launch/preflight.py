"""Checks every host of a hostfile before a run is started on them: one line a failure, with its remedy.

python launch/preflight.py --hostfile hostfile --config ds_configs/movielens-100k.json
python launch/preflight.py --hostfile hostfile --config ds_configs/movielens-100k.json --set train.epochs=1 --json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.preflight import main

if __name__ == "__main__":
    main()
