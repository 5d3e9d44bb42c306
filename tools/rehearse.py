"""One process becomes one true rank of a larger job: its memory, its FLOPs, every collective.

python tools/rehearse.py --config ds_configs/ladder/wukong-108gflop.json --hosts 32 --ranks-per-host 8
python tools/rehearse.py --config ds_configs/movielens-100k.json --hosts 2 --ranks-per-host 2 --rank 3 --json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.rehearse import main

if __name__ == "__main__":
    main()
