#!/usr/bin/env bash
# Train on a Slurm cluster.
# GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS choose the resources.
# Two minutes before its time is over the run saves a checkpoint and ends.
set -euo pipefail
: "${4:?usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]}"
set -x

PARTITION=$1
JOB_NAME=$2
CONFIG=$3
WORK_DIR=$4

# SRUN_ARGS holds several arguments, so it stays unquoted.
srun -p "$PARTITION" \
    --job-name="$JOB_NAME" \
    --gres=gpu:"${GPUS_PER_NODE:-8}" \
    --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    --signal=TERM@120 \
    ${SRUN_ARGS:-} \
    python -u "$(dirname "$0")/train.py" "$CONFIG" --work-dir="$WORK_DIR" \
    --launcher=slurm "${@:5}"
