"""Which features share a tower: learned from a short training of the flat model, or by a baseline.

python tools/partition_towers.py --config ds_configs/movielens-1m.json --towers 2 --output towers.json
python tools/partition_towers.py --config C.json --towers 4 --interactions towers-interactions.npy --output four.json
python tools/partition_towers.py --config C.json --towers 4 --strategy greedy --output greedy.json

Beside towers.json: towers.png (the plane), towers-matrix.png, towers-interactions.npy (what a probe found).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.partition_towers import main

if __name__ == "__main__":
    main()
