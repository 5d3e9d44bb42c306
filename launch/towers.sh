#!/usr/bin/env bash
# The study of docs/results/towers.md, what towers cost in quality on data with hidden groups: data, partitions, sweep,
# table and figure, into runs/towers.
#   bash launch/towers.sh [JOBS] [STUDY]     JOBS runs at a time (2) of a study of ds_configs/studies (towers); goes on
#                                            where an earlier one ended. towers-first is the part that was published
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment
cd "$root"
study=ds_configs/studies/${2:-towers}.json
towers=data/grouped-towers
if [ ! -f data/grouped/schema.json ]; then
  python tools/prepare_data.py grouped --features 64 --groups 4 --rows 16 --examples 300000 --output data/grouped
fi
partition() {  # NAME and options of tools/partition_towers.py
  local output=$towers/$1.json
  shift
  [ -f "$output" ] || python tools/partition_towers.py --config ds_configs/studies/towers-base.json --towers 4 \
    --set train.output_dir=runs/towers-partitions --output "$output" "$@"
}
partition planted --strategy planted
partition random --strategy random
# Each family learns its partition by a probe of its own flat model, the first that the study names.
python -c 'import json, sys
for name, sets in json.load(open(sys.argv[1]))["models"].items():
    if name.endswith("-flat"):
        print(name[: -len("-flat")], json.dumps(sets["model"]))' "$study" |
  while read -r family model; do
    partition "$family-coherent" --set "model=$model" </dev/null
    partition "$family-diverse" --set "model=$model" --strategy diverse \
      --interactions "$towers/$family-coherent-interactions.npy" </dev/null
  done
python tools/scaling_law.py sweep --study "$study" --output runs/towers --jobs "${1:-2}"
python tools/scaling_law.py towers --points runs/towers/runs.parquet --plot runs/towers/towers.png
