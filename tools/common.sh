# shellcheck shell=bash
# Functions that the scripts beside this file share. Sourced, not run.

TOOLS_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PROJECT_DIR=$(dirname "$TOOLS_DIR")
# STACK=lowest, newest and onedl stand for other lists of packages, in an environment of their own.
REQUIREMENTS=requirements/${STACK:-stack}.txt
# What is built here, from sources: mmcv with its operators, and OneDL's other packages.
SOURCES=${REQUIREMENTS%.txt}-sources.txt
# shellcheck disable=SC2034 # Used by the scripts that read this.
[[ -f $PROJECT_DIR/$SOURCES ]] || SOURCES=requirements/mmcv.txt
VENV=$PROJECT_DIR/.venv${STACK:+-$STACK}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# elapsed SECONDS: a duration for people.
elapsed() { printf '%d min %02d s' $(($1 / 60)) $(($1 % 60)); }

# The Python that has mmvmamba: the active environment's, else the quick start's, else the system's.
project_python() {
    local conda=${CONDA_DEFAULT_ENV:-base}
    if [[ -n ${VIRTUAL_ENV:-} || $conda != base ]]; then
        command -v python || fail "an environment is active, but it has no python."
    elif [[ -x $VENV/bin/python ]]; then
        printf '%s\n' "$VENV/bin/python"
    else
        command -v python3 || command -v python || fail "no python3 on the PATH."
    fi
}

# run_distributed N SCRIPT ARGUMENTS...: N processes of a Python script on this machine. When one of
# them dies, all are started again, up to MAX_RESTARTS times.
run_distributed() {
    local processes=$1 python place
    shift
    python=$(project_python)
    if [[ ${NNODES:-1} == 1 && -z ${PORT:-} ]]; then
        # A free port, so that two runs on one machine do not meet.
        place=(--standalone --local-addr=127.0.0.1)
    else
        place=(
            --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}"
            --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}"
        )
    fi
    # Where mmvmamba is not installed, the script itself says so.
    "$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("mmvmamba"))' ||
        exec "$python" "$1" --help
    exec "$python" -m mmvmamba.engine.launch "${place[@]}" --nproc_per_node="$processes" \
        --max_restarts="${MAX_RESTARTS:-0}" "$@" --launcher pytorch
}

# run_on_slurm SCRIPT ARGUMENTS...: one process per GPU (per task) of the current Slurm request.
run_on_slurm() {
    local python
    python=$(project_python)
    command -v srun >/dev/null || fail "srun not found: this is no Slurm machine. Use tools/dist_*.sh."
    local gpus=${GPUS:-8}
    local gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
    # SRUN_ARGS is a list of options, to be split at its spaces.
    # shellcheck disable=SC2086
    exec srun -p "$PARTITION" --job-name="$JOB_NAME" --gres="gpu:$gpus_per_node" --ntasks="$gpus" \
        --ntasks-per-node="$gpus_per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
        ${SRUN_ARGS:-} "$python" -u "$@" --launcher slurm
}

# Hides the GPU, if there is one, from an environment whose mmcv has operators for the CPU alone.
hide_unusable_gpu() {
    if grep -q -e '-cpu-' "$VENV/setup-stamps/mmcv"; then
        export CUDA_VISIBLE_DEVICES=-1
    fi
}
