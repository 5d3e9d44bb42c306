"""Is quality a power of compute? A sweep over sizes and seeds, the law with its intervals, and the figure.

python tools/scaling_law.py sweep --study ds_configs/studies/planted.json --jobs 2 --hours 8
python tools/scaling_law.py sweep --study ds_configs/studies/planted.json --engine ray --address HEAD:6379
python tools/scaling_law.py sweep --study ds_configs/studies/planted.json --array 3/16       # or launch/sweep.sh
python tools/scaling_law.py table --points runs/planted/runs.parquet
python tools/scaling_law.py towers --points runs/towers/runs.parquet --plot towers.png
python tools/scaling_law.py fit                                   # the published ladder
python tools/scaling_law.py fit --points runs.parquet --against parameters --family wukong --json
python tools/scaling_law.py plot --points runs.csv --output figures --tensorboard runs/tensorboard
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.scaling_law import main

if __name__ == "__main__":
    main()
