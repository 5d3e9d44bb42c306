"""A FuxiCTR recipe -> a run's JSON and the spec of its data (docs/recipes.md).

python tools/import_recipe.py model_config.yaml --experiment DNN_frappe --output recipe.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.import_recipe import main

if __name__ == "__main__":
    main()
