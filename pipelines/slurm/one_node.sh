#!/bin/bash
# One node with several GPUs: pretrain or study. One task is one process with one GPU.
#
#     sbatch one_node.sh study BIDS_DIR OUTPUT_DIR --target age sex --batch-size 128
#
# --batch-size counts the participants of all GPUs together.
#
#SBATCH --job-name=nidl-dcl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
set -euo pipefail

# The tasks of a node share what the first one prepares there.
work="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/nidl-dcl-$(id -u)"

# After training the first task goes on alone: the others must be allowed to end before it
# (--wait=0). When one fails, all are ended (--kill-on-bad-exit).
srun --kill-on-bad-exit=1 --wait=0 nidl-dcl "$@" \
  --work-dir "$work" --strategy ddp --devices "$SLURM_NTASKS_PER_NODE"
