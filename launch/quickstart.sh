#!/usr/bin/env bash
# From a fresh clone to a trained Wukong on real data: environment, MovieLens-100K, two DeepSpeed ranks, test metrics.
#   bash launch/quickstart.sh [--set section.key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment
cd "$root"
data=data/movielens-100k
if [ -f "$data/schema.json" ]; then
  echo "data: $data (ready)"
else
  echo "data: preparing MovieLens-100K in $data"
  python tools/prepare_data.py movielens-100k --output "$data"
fi
echo "training: deepspeed --num_gpus 2 launch/train.py --config ds_configs/movielens-100k.json $*"
deepspeed --log_level error --num_gpus 2 \
  launch/train.py --config ds_configs/movielens-100k.json "$@"
echo
echo "TensorBoard: ${venv#"$root"/}/bin/tensorboard --logdir runs/movielens-100k --host localhost"
