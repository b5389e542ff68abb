#!/bin/bash
# A job that may be preempted or reach its time limit, and then goes on from its last checkpoint.
#
#     sbatch requeue.sh study BIDS_DIR OUTPUT_DIR --target age sex
#
#SBATCH --job-name=nidl-dcl
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM to the task, five minutes before the end: it finishes its step, writes a checkpoint and
# ends with 143. (Not B:TERM, which signals this script alone; and srun that gets a SIGTERM kills
# its tasks.)
#SBATCH --signal=TERM@300
set -euo pipefail

# A preempted job's script may get the signal too; it must outlive the task.
trap ':' TERM

# Checkpoints are kept in OUTPUT_DIR, so the job may go on at another node.
work="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/nidl-dcl-$(id -u)"

status=0
srun nidl-dcl "$@" --work-dir "$work" --devices 1 || status=$?
if ((status == 143)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
