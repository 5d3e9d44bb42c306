"""A trained model on a prepared split: AUC, LogLoss, NE and calibration; predictions as a file.

python tools/evaluate.py --run runs/movielens-100k --data data/movielens-100k
python tools/evaluate.py --run runs/movielens-100k/checkpoints/latest --data data/movielens-100k --split valid --json
python tools/evaluate.py --run exported --data data/movielens-100k --predictions predictions.parquet
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.evaluate import main

if __name__ == "__main__":
    main()
