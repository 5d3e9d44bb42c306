#!/usr/bin/env bash
# One run on many hosts, started from any machine that reaches them over ssh: preflight, launch, true exit code.
#   bash launch/multihost.sh --hostfile hostfile --config ds_configs/movielens-100k.json [--set section.key=value ...]
#   bash launch/multihost.sh ... --launcher torchrun     a torchrun a host over ssh, in place of DeepSpeed's launcher
#   bash launch/multihost.sh ... --resume                from the latest checkpoint
#   bash launch/multihost.sh ... --restarts 3            again from the latest checkpoint after a crash, up to 3 times
#   bash launch/multihost.sh ... --restarts 3 --restart-on-remaining    without the hosts that are gone by then
# The hosts hold this checkout, its environment (bash launch/environment.sh), the data and the working directory under
# the same paths as here. MEGAREC_VENV names another environment than .venv.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${MEGAREC_VENV:-$root/.venv}/bin/python
if [ ! -x "$python" ]; then
  echo "error: no $python: run 'bash launch/environment.sh' on every host, or set MEGAREC_VENV" >&2
  exit 2
fi
# -P: -m alone would look for modules in the working directory first.
PYTHONPATH=$root exec "$python" -P -m megarec launch multihost "$@"
