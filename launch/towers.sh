#!/usr/bin/env bash
# The study of docs/results/towers.md, what towers cost in quality on data with hidden groups: data, partitions, sweep,
# table and figure, into runs/towers.
#   bash launch/towers.sh [JOBS] [STUDY]     JOBS runs at a time (2) of a study of ds_configs/studies (towers); goes on
#                                            where an earlier one ended. towers-first is the part that was published
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
jobs=${1:-2} study=ds_configs/studies/${2:-towers}.json
# Checked before the data and the partitions.
[[ $jobs =~ ^[1-9][0-9]*$ ]] || { echo "error: JOBS $jobs: expected a whole number from 1 on" >&2; exit 2; }
[ -f "$root/$study" ] || { echo "error: STUDY ${2:-}: no $study; expected towers or towers-first" >&2; exit 2; }
use_environment
cd "$root"
towers=data/grouped-towers
if [ ! -f data/grouped/schema.json ]; then
  python tools/prepare_data.py grouped --features 64 --groups 4 --rows 8 --examples 300000 --output data/grouped
fi
partition() {  # NAME and options of tools/partition_towers.py
  local output=$towers/$1.json
  shift
  [ -f "$output" ] || python tools/partition_towers.py --config ds_configs/studies/towers-base.json --towers 4 \
    --set train.output_dir=runs/towers-partitions --output "$output" "$@"
}
partition planted --strategy planted
partition random --strategy random
partition coherent
partition diverse --strategy diverse --interactions "$towers/coherent-interactions.npy"
python tools/scaling_law.py sweep --study "$study" --output runs/towers --jobs "$jobs"
python tools/scaling_law.py towers --points runs/towers/runs.parquet --plot runs/towers/towers.png
