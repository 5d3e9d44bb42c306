"""What a launcher starts on every rank: the same as `megarec train`. Nothing imports this module.

deepspeed --num_gpus 2 --module megarec.train --config run.json
torchrun --nproc_per_node 2 -m megarec.train --config run.json
python megarec/train.py --config run.json    (by path: our own launchers, which cannot rely on an installed package)
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run by path: Python looked for modules in this directory
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from megarec.commands.train import main

    main()
