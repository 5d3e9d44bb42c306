#!/usr/bin/env bash
#SBATCH --job-name=megarec
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --output=megarec-%j.log
# One run on the nodes of a Slurm allocation: srun starts one torchrun a node. Submit from the checkout, on a file system
# that all nodes share, with its environment (bash launch/environment.sh) in place:
#   sbatch --nodes 16 launch/slurm.sh --config ds_configs/movielens-100k.json [--set section.key=value ...] [--resume]
# 120 s before the time limit the ranks get SIGUSR1, save, and end with exit code 75; pre-empted, they get SIGTERM. The job
# then queues itself again, after a crash as well, RESTARTS times at most (default 3; 0: never), and resumes.
# RANKS_PER_NODE (default: the GPUs of a node) and MASTER_PORT may be set; so may GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.
set -euo pipefail
root=${SLURM_SUBMIT_DIR:?sbatch sets it: submit this script with sbatch}
python=${MEGAREC_VENV:-$root/.venv}/bin/python
[ -f "$root/launch/train.py" ] || { echo "error: $root is not a megarec checkout: submit from one" >&2; exit 2; }
[ -x "$python" ] || { echo "error: no $python: run 'bash launch/environment.sh' first, or set MEGAREC_VENV" >&2; exit 2; }
ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
[ -n "$ranks" ] || { echo "error: no GPUs in this allocation: set RANKS_PER_NODE" >&2; exit 2; }
names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${names%%$'\n'*}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export RANKS_PER_NODE=$ranks TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
count=${SLURM_RESTART_COUNT:-0} restarts=${RESTARTS:-3}
if [ "$count" -gt 0 ]; then
  echo "RESTART $count OF $restarts: resuming from the latest checkpoint"
  set -- "$@" --resume
fi
trap : TERM USR1 # for this shell to outlive srun, should it get them too
# Words reach the nodes as they are: srun copies its arguments, and the inner shell names each only as "$@".
# trap "": torchrun would die of SIGUSR1; the ranks, which handle it, still get it.
# --kill-on-bad-exit: a node whose torchrun fails ends the others; srun's exit code is the largest of theirs.
code=0
# shellcheck disable=SC2016
# One task a node would be bound to one core and, on some clusters, to one GPU; its ranks need all of them.
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --cpu-bind=none --gpu-bind=none \
  --kill-on-bad-exit=1 --label bash -c '
  trap "" USR1
  torchrun=$1
  shift
  exec "$0" "$torchrun" --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" \
    --nproc_per_node "$RANKS_PER_NODE" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
' "$python" "$root/megarec/launching/torchrun.py" "$root/megarec/train.py" "$@" || code=$?
case $code in
  0) exit ;;
  2 | 70) echo "NOT RESTARTED: exit code $code: a restart would end the same way" >&2 && exit "$code" ;;
esac
if [ "$count" -ge "$restarts" ]; then
  echo "NOT RESTARTED: exit code $code, and $count of $restarts restarts are used up" >&2
  exit "$code"
fi
echo "QUEUED AGAIN: exit code $code; restart $((count + 1)) of $restarts" >&2
exec scontrol requeue "$SLURM_JOB_ID"
