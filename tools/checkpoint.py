"""Inspect a checkpoint, verify it, rewrite it for another number of ranks, export its model.

python tools/checkpoint.py inspect runs/movielens-100k                  # a run, its checkpoints, or one of them
python tools/checkpoint.py verify runs/movielens-100k/checkpoints/step-000000100
python tools/checkpoint.py reshape runs/movielens-100k/checkpoints/latest reshaped --ranks 64
python tools/checkpoint.py export runs/movielens-100k exported                 # its best
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.checkpoint import main

if __name__ == "__main__":
    main()
