#!/usr/bin/env bash
# Trains with several processes: one per GPU, or any number of them on a machine without GPUs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if (($# < 2)); then
    cat >&2 <<'USAGE'
usage: bash tools/dist_train.sh CONFIG PROCESSES [options of tools/train.py]
  bash tools/dist_train.sh configs/mask_rcnn/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py 8 --amp
Several machines: the same command on each, with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
With MAX_RESTARTS=20 and --resume a training whose processes die restarts by itself. docs/distributed.md
USAGE
    exit 2
fi
run_distributed "$2" "$TOOLS_DIR/train.py" "$1" "${@:3}"
