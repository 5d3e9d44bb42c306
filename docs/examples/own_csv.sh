#!/usr/bin/env bash
# Your own CSV -> a prediction, in three commands. docs/examples/shop/ stands for your files: 1,400 made-up rows.
#   bash docs/examples/own_csv.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/environment.sh
use_environment
shop=docs/examples/shop

# 1. Rows -> data. columns.json says what each column is (docs/data.md). Vocabularies are counted on the training
#    file. Whatever does not fit stops here, with file, row, column and value.
python tools/prepare_data.py table --schema $shop/columns.json --output data/shop \
  --train $shop/train.csv --valid $shop/valid.csv --test $shop/test.csv

# 2. Data -> a trained model. run.json is the whole run (docs/configuration.md).
python launch/train.py --config $shop/run.json

# 3. Model -> a probability for each row of the test split.
python docs/examples/predict.py runs/shop data/shop runs/shop/predictions.csv
head -4 runs/shop/predictions.csv
