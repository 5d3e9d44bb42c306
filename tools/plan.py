"""Plan before you pay: a step of a run on any described machine, and whether towers pay there.

python tools/plan.py --config ds_configs/ladder/wukong-5.6gflop.json --hardware h100 --hosts 8 --ranks-per-host 8
python tools/plan.py --measure runs/this-machine.json
torchrun --nproc_per_node 2 tools/plan.py --measure runs/this-machine.json      # and its links
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.plan import main

if __name__ == "__main__":
    main()
