"""One run, started by the deepspeed launcher, by torchrun, or as it is on one rank:

deepspeed --num_gpus 2 launch/train.py --config ds_configs/movielens-100k.json
torchrun --nproc_per_node 2 launch/train.py --config ds_configs/movielens-100k.json --set train.epochs=1
python launch/train.py --config ds_configs/movielens-100k.json --resume
python launch/train.py --config ds_configs/movielens-100k.json --print-config
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.train import main

if __name__ == "__main__":
    main()
