#!/usr/bin/env bash
# Test on several devices.
# On several machines set NNODES, NODE_RANK, MASTER_ADDR and PORT.
set -euo pipefail
: "${3:?usage: tools/dist_test.sh CONFIG CHECKPOINT NUM_PROCESSES [arguments of test.py]}"

CONFIG=$1
CHECKPOINT=$2
PROCESSES=$3

python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$PROCESSES" \
    "$(dirname "$0")/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "${@:4}"
