#!/bin/bash
# After embed_array.sh: collects what the jobs computed, computes what is missing, draws the figures.
#
#     sbatch --dependency=afterany:JOB embed_merge.sh BIDS_DIR OUTPUT_DIR MODEL_FOLDER
#
#SBATCH --job-name=nidl-dcl-merge
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=04:00:00
set -euo pipefail
bids="$1" out="$2" model="$3"

srun nidl-dcl embed "$bids" "$out" --model "$model"
