#!/bin/bash
# Several nodes with several GPUs each: pretrain or study. One task is one process with one GPU.
#
#     sbatch several_nodes.sh study BIDS_DIR OUTPUT_DIR --target age sex --batch-size 256
#
# BIDS_DIR and OUTPUT_DIR are on a disk that all nodes see.
#
#SBATCH --job-name=nidl-dcl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
set -euo pipefail

# Each node prepares the volumes once, on its own disk.
work="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/nidl-dcl-$(id -u)"

srun --kill-on-bad-exit=1 --wait=0 nidl-dcl "$@" \
  --work-dir "$work" --strategy ddp \
  --devices "$SLURM_NTASKS_PER_NODE" --num-nodes "$SLURM_JOB_NUM_NODES"
