r"""Raw data -> parquet shards + schema.json, whole or not at all.

python tools/prepare_data.py movielens-100k --output data/movielens-100k
python tools/prepare_data.py movielens-1m --output data/movielens-1m --split time --history 20
python tools/prepare_data.py table --schema spec.json --train T.csv --valid V.csv --test E.csv --output data/mine
python tools/prepare_data.py table --like data/mine --test TOMORROW.csv --output data/tomorrow
python tools/prepare_data.py criteo --data raw/day_* --output /shared/criteo --engine ray --address HEAD:6379
python tools/prepare_data.py synthetic --output data/synthetic --examples 10000
python tools/prepare_data.py synthetic --schema ds_configs/schemas/wukong-ladder.json --max-rows 1000 \
    --examples 20000 --output data/ladder
python tools/prepare_data.py synthetic --order 8 --single 16 --rows 8 --groups 4 --examples 400000 --output data/planted
python tools/prepare_data.py grouped --features 64 --groups 4 --output data/grouped
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.commands.prepare_data import main

if __name__ == "__main__":
    main()
