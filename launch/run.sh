#!/usr/bin/env bash
# One run on this machine under the deepspeed launcher, watched: the cause of its end first, its true exit code, and
# restarts from the latest checkpoint.
#   bash launch/run.sh --num_gpus 2 --config ds_configs/movielens-100k.json [--set section.key=value ...] [--resume]
#   bash launch/run.sh ... --restarts 3 --grace 120      again after a crash or a pre-emption, up to 3 times; 120 s to
#                                                        save after SIGTERM or SIGUSR1, which also end the restarting
# MEGAREC_VENV names another environment than .venv (bash launch/environment.sh makes that).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${MEGAREC_VENV:-$root/.venv}/bin/python
if [ ! -x "$python" ]; then
  echo "error: no $python: run 'bash launch/environment.sh', or set MEGAREC_VENV" >&2
  exit 2
fi
# -P: -m alone would look for modules in the working directory first.
PYTHONPATH=$root exec "$python" -P -m megarec launch one-host "$@"
