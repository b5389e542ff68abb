#!/bin/bash
# A job array embeds a dataset with a trained model: each job computes its share of the participants
# into the work folder of one output (OUTPUT_DIR/.work, on a disk that all nodes see). Then one job
# collects them, checks that nobody is missing, and draws the figures.
#
#     job=$(sbatch --parsable embed_array.sh BIDS_DIR OUTPUT_DIR MODEL_FOLDER)
#     sbatch --dependency=afterany:"$job" embed_merge.sh BIDS_DIR OUTPUT_DIR MODEL_FOLDER
#
#SBATCH --job-name=nidl-dcl-embed
#SBATCH --array=1-20
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=04:00:00
set -euo pipefail
bids="$1" out="$2" model="$3"

# Every n-th participant, beginning with this job's own number.
everyone=("$bids"/sub-*/)
mine=()
for ((i = SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN; i < ${#everyone[@]}; i += SLURM_ARRAY_TASK_COUNT)); do
  mine+=("$(basename "${everyone[i]}")")
done
if ((${#mine[@]} == 0)); then
  exit 0
fi

# A broken image is told in logs/inputs.tsv; whether they are too many is judged at the end.
srun nidl-dcl embed "$bids" "$out" --model "$model" --max-skipped 1 --participant-label "${mine[@]}"
