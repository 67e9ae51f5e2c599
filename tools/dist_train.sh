#!/usr/bin/env bash
# Train on the GPUs of one node or several by torch's launcher. The same line on every node:
#   NNODES=2 MASTER_ADDR=node1 tools/dist_train.sh configs/cascade/convnext_t.py --work-dir DIR [arguments of train.py]
# NNODES       nodes (1)
# GPUS         processes a node (all its GPUs)
# MASTER_ADDR  name or address of one of the nodes, the same on all (localhost)
# MASTER_PORT  a free port there (29500); another for each run
set -euo pipefail

exec python -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --nproc_per_node "${GPUS:-gpu}" \
    --rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29500}" --rdzv_id convnext_dense \
    "$(dirname "$0")/train.py" "$@" --launcher pytorch
