#!/usr/bin/env bash
# Evaluates with several processes: one per GPU, or any number of them on a machine without GPUs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if (($# < 3)); then
    cat >&2 <<'USAGE'
usage: bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [options of tools/test.py]
  bash tools/dist_test.sh configs/mask_rcnn/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py epoch_12.pth 8
Several machines: the same command on each, with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
USAGE
    exit 2
fi
run_distributed "$3" "$TOOLS_DIR/test.py" "$1" "$2" "${@:4}"
