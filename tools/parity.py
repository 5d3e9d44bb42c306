"""One model, any topology, the same numbers: train the same steps under many topologies, compare with one process.

python tools/parity.py
python tools/parity.py --matrix full --json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.parity import main

if __name__ == "__main__":
    main()
