"""The JSON schema of a run's file, for editors that complete and check as you type.

python tools/config_schema.py > ds_configs/schema.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.config_schema import main

if __name__ == "__main__":
    main()
