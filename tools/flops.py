"""Parameters and training FLOPs per example of a run's model, by part and by layer; nothing is built.

python tools/flops.py --config ds_configs/dlrm-criteo-terabyte.json
python tools/flops.py --config ds_configs/dlrm-criteo-terabyte.json --set "model.head=[1024, 1024, 512, 256]" --json
python tools/flops.py --config ds_configs/ladder/wukong-5.6gflop.json --roofline H200 --batch 8192
python tools/flops.py --ladder        # every ladder config beside the published figure
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.flops import main

if __name__ == "__main__":
    main()
