#!/bin/bash
# One GPU: any command of nidl-dcl.
#
#     sbatch one_gpu.sh study BIDS_DIR OUTPUT_DIR --target age sex
#
#SBATCH --job-name=nidl-dcl
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=24:00:00
set -euo pipefail

# Prepared volumes are read in every epoch: best from a disk of the node.
work="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/nidl-dcl-$(id -u)"

srun nidl-dcl "$@" --work-dir "$work" --devices 1
