#!/usr/bin/env bash
# A search of docs/results/search.md at equal effort: data, trials, tests and table, into runs/search-NAME.
#   bash launch/search.sh [JOBS] [NAME]     JOBS runs at a time (2) of a search of ds_configs/search (movielens-100k;
#                                           movielens-100k-by-time, movielens-1m); goes on where an earlier one ended
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
jobs=${1:-2} name=${2:-movielens-100k}
# Checked before the data.
[[ $jobs =~ ^[1-9][0-9]*$ ]] || { echo "error: JOBS $jobs: expected a whole number from 1 on" >&2; exit 2; }
case $name in
  movielens-100k) source=movielens-100k options=() ;;
  movielens-100k-by-time) source=movielens-100k options=(--split time) ;;
  movielens-1m) source=movielens-1m options=() ;;
  *) echo "error: NAME $name: expected movielens-100k, movielens-100k-by-time or movielens-1m" >&2; exit 2 ;;
esac
use_environment
cd "$root"
if [ ! -f "data/$name/schema.json" ]; then
  python tools/prepare_data.py "$source" "${options[@]}" --output "data/$name"
fi
python tools/scaling_law.py sweep --study "ds_configs/search/$name.json" --output "runs/search-$name" --jobs "$jobs"
