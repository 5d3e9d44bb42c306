#!/usr/bin/env bash
# The study of docs/scaling_law.md on planted interactions: data, sweep, table, fit and figure, into runs/planted.
#   bash launch/planted.sh [JOBS]     JOBS runs at a time (2); goes on where an earlier one ended
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment
cd "$root"
if [ ! -f data/planted/schema.json ]; then
  python tools/prepare_data.py synthetic --order 8 --single 12 --rows 4 --groups 3 --examples 400000 --output data/planted
fi
python tools/scaling_law.py sweep --study ds_configs/studies/planted.json --jobs "${1:-2}"
for command in table fit plot; do
  arguments=(--points runs/planted/runs.parquet)
  if [ $command = plot ]; then arguments+=(--output runs/planted/figures); fi
  python tools/scaling_law.py $command "${arguments[@]}"
done
