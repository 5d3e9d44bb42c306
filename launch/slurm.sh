#!/usr/bin/env bash
#SBATCH --job-name=megarec
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=megarec-%j.log
# One run on the nodes of a Slurm allocation: srun starts one torchrun a node. Submit from the checkout, on a file system
# that all nodes share, with its environment (bash launch/environment.sh) in place:
#   sbatch --nodes 16 launch/slurm.sh --config ds_configs/movielens-100k.json [--set section.key=value ...] [--resume]
# RANKS_PER_NODE (default: the GPUs of a node) and MASTER_PORT may be set; so may GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.
set -euo pipefail
root=${SLURM_SUBMIT_DIR:?sbatch sets it: submit this script with sbatch}
python=${MEGAREC_VENV:-$root/.venv}/bin/python
[ -f "$root/launch/train.py" ] || { echo "error: $root is no megarec checkout: submit from one" >&2; exit 2; }
[ -x "$python" ] || { echo "error: no $python: run 'bash launch/environment.sh' first, or set MEGAREC_VENV" >&2; exit 2; }
ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
[ -n "$ranks" ] || { echo "error: no GPUs in this allocation: set RANKS_PER_NODE" >&2; exit 2; }
names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${names%%$'\n'*}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export RANKS_PER_NODE=$ranks TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# Words reach the nodes as they are: srun copies its arguments, and the inner shell names each only as "$@".
# --kill-on-bad-exit: a node whose torchrun fails ends the others; srun's exit code is the largest of theirs.
# shellcheck disable=SC2016
exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 --label bash -c '
  exec "$0" -m torch.distributed.run --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" \
    --nproc_per_node "$RANKS_PER_NODE" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
' "$python" "$root/launch/train.py" "$@"
