"""Permutation importance: what a model's metrics lose when a feature's values are permuted.

python tools/importance.py runs/movielens-100k
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.importance import main

if __name__ == "__main__":
    main()
