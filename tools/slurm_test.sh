#!/usr/bin/env bash
# Evaluates under Slurm.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if (($# < 4)); then
    cat >&2 <<'USAGE'
usage: [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS="..."] \
       bash tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]
USAGE
    exit 2
fi
PARTITION=$1 JOB_NAME=$2
run_on_slurm "$TOOLS_DIR/test.py" "${@:3}"
