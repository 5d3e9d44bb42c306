"""An export over HTTP: raw rows in, probabilities out.

python tools/checkpoint.py export runs/movielens-100k exported --format onnx
python tools/serve.py exported --port 8000
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.serve import main

if __name__ == "__main__":
    main()
