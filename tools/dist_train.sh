#!/usr/bin/env bash
# Train on several devices.
# On several machines set NNODES, NODE_RANK, MASTER_ADDR and PORT.
set -euo pipefail
: "${2:?usage: tools/dist_train.sh CONFIG NUM_PROCESSES [arguments of train.py]}"

CONFIG=$1
PROCESSES=$2

python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$PROCESSES" \
    "$(dirname "$0")/train.py" "$CONFIG" --launcher pytorch "${@:3}"
