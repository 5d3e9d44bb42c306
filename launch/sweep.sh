#!/usr/bin/env bash
#SBATCH --job-name=megarec-sweep
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=megarec-sweep-%A_%a.log
# A sweep as a Slurm job array: every task runs its share of the study's runs, one at a time, on one GPU. Submit from the
# checkout, on a file system that all nodes share, with its environment (bash launch/environment.sh) in place:
#   sbatch --array=0-15 launch/sweep.sh --study ds_configs/studies/planted.json [--output DIR] [--jobs N]
# Where a study has several learning rates and several seeds, a second time: the first chooses rates for the other seeds.
#   sbatch --array=0-15 --dependency=afterany:JOB launch/sweep.sh --study ds_configs/studies/planted.json
# Then collect the rows; a task whose rows are not all there is named, with what runs them:
#   python tools/scaling_law.py sweep --study ds_configs/studies/planted.json
# For one such task alone: sbatch --array=0 launch/sweep.sh --study ds_configs/studies/planted.json --array 4/16
# A task that is killed or pre-empted goes on where it was, when Slurm or the same command starts it again.
set -euo pipefail
root=${SLURM_SUBMIT_DIR:?sbatch sets it: submit this script with sbatch}
python=${MEGAREC_VENV:-$root/.venv}/bin/python
[ -f "$root/tools/scaling_law.py" ] || { echo "error: $root is not a megarec checkout: submit from one" >&2; exit 2; }
[ -x "$python" ] || { echo "error: no $python: run 'bash launch/environment.sh' first, or set MEGAREC_VENV" >&2; exit 2; }
case " $* " in
  *" --array "* | *" --array="*) ;;
  *) set -- "$@" --array ;;
esac
cd "$root"
exec "$python" tools/scaling_law.py sweep "$@"
