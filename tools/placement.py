"""Where a run's tables lie and why: kind, ranks and bytes of every table, bytes and lookups of every rank.

python tools/placement.py --config ds_configs/movielens-100k.json --hosts 2 --ranks-per-host 2
python tools/placement.py --config C.json --hosts 8 --ranks-per-host 8 --set embedding.placement=auto --json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.placement import main

if __name__ == "__main__":
    main()
