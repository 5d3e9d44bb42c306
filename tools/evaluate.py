"""A trained model on a prepared split: metrics with intervals, by group and by slice, calibration, a comparison.

python tools/evaluate.py --run runs/movielens-100k --data data/movielens-100k
python tools/evaluate.py --run runs/movielens-100k/checkpoints/latest --data data/movielens-100k --split valid --json
python tools/evaluate.py --run exported --data data/movielens-100k --predictions predictions.parquet
python tools/evaluate.py --run runs/movielens-100k --data data/movielens-100k --group user_id --html evaluation.html
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.evaluate import main

if __name__ == "__main__":
    main()
