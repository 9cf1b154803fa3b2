#!/usr/bin/env bash
# Makes .venv with everything the project runs on, or completes one that was interrupted.
#
# Variables: PYTHON (the interpreter to use), MAX_JOBS (compiler processes),
# XDG_CACHE_HOME (mmcv's wheel is kept in mmvmamba/wheels below it; ~/.cache by default),
# STACK (lowest or newest: the packages of requirements/STACK.txt, in .venv-STACK).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$PROJECT_DIR"
STAMPS=$VENV/setup-stamps
LOGS=$PROJECT_DIR/work_dirs/setup
: "${HOME:=~}"
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/mmvmamba/wheels
DISK_GB=8
HEARTBEAT_SECONDS=${HEARTBEAT_SECONDS:-20}

# What the caller's shell has set must not lead pip or Python out of .venv.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1

content_hash() {
    if command -v sha256sum >/dev/null; then cat "$@" | sha256sum; else cat "$@" | shasum -a 256; fi |
        cut -c1-16
}

# step NAME KEY DURATION TITLE COMMAND...: runs a command whose result is kept until KEY changes.
# With WITHOUT set to what is lost, a step that fails is left out instead of ending the set-up.
step() {
    local name=$1 key=$2 duration=$3 title=$4 begin=$SECONDS status
    shift 4
    if [[ -f $STAMPS/$name && $(<"$STAMPS/$name") == "$key" ]]; then
        printf -- '-- %s: done before\n' "$title"
        return
    fi
    printf -- '-- %s (about %s)\n' "$title" "$duration"
    # Not `with_heartbeat ... ||`, in which bash would let the step's commands fail unnoticed.
    set +e
    with_heartbeat "$LOGS/$name.log" "$@"
    status=$?
    set -e
    if ((status)) && [[ -n ${WITHOUT:-} ]]; then
        printf -- '   not done, %s (%s):\n' "$WITHOUT" "$LOGS/$name.log"
        tail -n 3 "$LOGS/$name.log" | cut -c1-200
        return
    elif ((status)); then
        printf '\n' >&2
        tail -n 15 "$LOGS/$name.log" >&2
        printf '\n' >&2
        advise "$LOGS/$name.log"
        fail "step '$title' did not finish; its whole log is $LOGS/$name.log. The same command goes on from here."
    fi
    mkdir -p "$STAMPS"
    printf '%s\n' "$key" >"$STAMPS/$name"
    printf -- '   finished in %s\n' "$(elapsed $((SECONDS - begin)))"
}

# with_heartbeat LOG COMMAND...: output goes to the log; every now and then a line says how far it is.
with_heartbeat() {
    local log=$1 begin=$SECONDS last=$SECONDS now status
    shift
    mkdir -p "$(dirname "$log")"
    # A process group of its own, to be stopped as a whole.
    set -m
    (
        set -e
        "$@"
    ) >"$log" 2>&1 </dev/null &
    CHILD=$!
    set +m
    while kill -0 "$CHILD" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - last >= HEARTBEAT_SECONDS)); then
            last=$SECONDS
            # ninja's count of compiled files where there is one, else the newest line.
            now=$(tail -n 30 "$log" | grep -oE '^ *\[[0-9]+/[0-9]+\]' | tail -n 1 || true)
            now=${now:+files compiled: ${now// /}}
            [[ -n $now ]] || now=$(tail -n 1 "$log" | tr -d '\r' | cut -c1-80)
            printf -- '   %s: %s\n' "$(elapsed $((SECONDS - begin)))" "$now"
        fi
    done
    wait "$CHILD"
    status=$?
    CHILD=
    return "$status"
}

# An interrupted set-up leaves no compiler or download running behind it.
CHILD=
stop_child() {
    [[ -z $CHILD ]] || kill -- -"$CHILD" 2>/dev/null || true
}
trap 'stop_child; printf "\ninterrupted; the same command goes on from here.\n" >&2; exit 130' INT TERM

advise() {
    if grep -qiE 'No space left|disk quota' "$1"; then
        printf 'The disk is full: about %s GB are needed in %s.\n' "$DISK_GB" "$PROJECT_DIR" >&2
    elif grep -qE 'DO NOT MATCH THE HASHES|HashMismatch' "$1"; then
        printf 'A downloaded file is not the one that was tested; a mirror may be at fault.\n' >&2
    elif grep -qiE 'NewConnectionError|ConnectTimeout|ReadTimeout|Temporary failure in name|SSLError' "$1"; then
        printf 'The package index was not reached: check the network, or the index in pip config list.\n' >&2
    elif grep -qE 'No matching distribution' "$1"; then
        printf 'The package index has no file for this system: %s, Python %s.\n' \
            "$(uname -sm)" "$("$VENV/bin/python" -V 2>&1)" >&2
    elif grep -qiE 'Killed|out of memory|cannot allocate' "$1"; then
        printf 'The machine ran out of memory: set MAX_JOBS=1 and try again.\n' >&2
    fi
}

usable_python() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
        >/dev/null 2>&1
}

# Prints the first Python that works. Names on the PATH are no proof: a version manager's shim exists
# for versions that are not installed or not chosen, so each candidate is run.
find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        usable_python "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.10 to 3.12 with venv: $("$PYTHON" -V 2>&1 || true)"
        command -v "$PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.10 /usr/bin/python3 /usr/bin/python3.1{2,1,0}; do
        if usable_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.10 to 3.12 with venv was found (tried python3, python3.12, python3.11, python3.10). Install one (Debian and Ubuntu: apt-get install python3.11 python3.11-venv python3.11-dev), or set PYTHON=/path/to/python."
}

make_venv() {
    # Another Python's leftovers would be found before the new one's packages.
    "$1" -m venv --clear "$VENV" && "$VENV/bin/python" -m pip --version
}

check_disk() {
    local free
    free=$(df -Pk "$PROJECT_DIR" | awk 'NR == 2 { print int($4 / 1048576) }')
    ((free >= DISK_GB)) || fail "$PROJECT_DIR has $free GB free; the set-up needs about $DISK_GB GB (torch brings its CUDA libraries)."
}

check_compiler() {
    local cxx=${CXX:-c++} python=$1 include
    printf '#include <vector>\nint main() { std::vector<int> v(1); return v[0]; }\n' |
        "$cxx" -std=c++17 -x c++ - -o /dev/null >/dev/null 2>&1 ||
        fail "no working C++17 compiler ($cxx). mmcv's operators are compiled here once: install one (Debian and Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or set CXX."
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    [[ -f $include/Python.h ]] ||
        fail "$include/Python.h is missing, which compiling mmcv's operators needs: install Python's headers (Debian and Ubuntu: apt-get install python3-dev for this version), or set PYTHON to another Python."
}

pinned() { sed -n "s/^$1==\([^ ;\\\\]*\).*/\1/p" "$REQUIREMENTS" | head -n 1; }

find_nvcc() {
    local candidate
    for candidate in "${CUDA_HOME:-/nonexistent}/bin/nvcc" nvcc /usr/local/cuda/bin/nvcc; do
        if command -v "$candidate" 2>/dev/null; then return; fi
    done
    return 1
}

# Prints what mmcv's operators are built for: 'cpu', or the CUDA version and the GPUs' capabilities.
accelerator() {
    local capabilities nvcc release wanted
    capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd+ -) || true
    if [[ ! $capabilities =~ ^[0-9] ]]; then
        echo cpu
        return
    fi
    wanted=$(sed -n 's/^nvidia-cuda-runtime[-cu0-9]*==\([0-9]*\).*/\1/p' "$REQUIREMENTS" | head -n 1)
    if nvcc=$(find_nvcc); then
        release=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
        if [[ ${release%%.*} == "$wanted" ]]; then
            echo "cuda$release-sm$capabilities"
            return
        fi
    fi
    printf 'note: this machine has a GPU, but no nvcc of CUDA %s (%s found). mmcv is built for the CPU, and\n      detection on the GPU needs its GPU operators: install the CUDA %s toolkit and run this again,\n      or set CUDA_VISIBLE_DEVICES=-1 to run on the CPU.\n' \
        "$wanted" "${release:-none}" "$wanted" >&2
    echo cpu
}

build_mmcv() {
    local folder=$1 source=$1/source built
    mkdir -p "$source"
    # The folder is kept until the wheel is made, so that what was compiled before an interruption
    # is not compiled again.
    if [[ ! -f $folder/unpacked ]]; then
        "$VENV/bin/python" -m pip download --no-deps --no-build-isolation --no-binary mmcv \
            --require-hashes -r requirements/mmcv.txt -d "$folder"
        tar -xzf "$folder"/mmcv-*.tar.gz -C "$source" --strip-components=1
        touch "$folder/unpacked"
    fi
    if [[ $ACCELERATOR == cpu ]]; then
        export FORCE_CUDA=0 CUDA_VISIBLE_DEVICES=-1
    else
        export FORCE_CUDA=1
        CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$(find_nvcc)")")")
        export CUDA_HOME
    fi
    # No debug information: a fifth of the size, and faster to compile.
    MMCV_WITH_OPS=1 CFLAGS="${CFLAGS:-} -g0" MAX_JOBS=$JOBS PATH=$VENV/bin:$PATH \
        "$VENV/bin/python" -m pip wheel -v --no-deps --no-build-isolation -w "$folder/out" "$source"
    built=$(find "$folder/out" -name 'mmcv-*.whl')
    # Moved within one file system: other set-ups see a whole wheel or none.
    mv "$built" "$2/"
    rm -rf "$folder"
}

cached_wheel() { find "$WHEELS" -name 'mmcv-*.whl' 2>/dev/null | head -n 1; }

install_mmcv() {
    local build=$WHEELS.build
    mkdir -p "$WHEELS"
    if [[ -z $(cached_wheel) ]]; then
        # One set-up builds; another that starts meanwhile waits here and takes its wheel.
        if command -v flock >/dev/null; then
            exec 9>"$WHEELS.lock"
            flock -n 9 || { echo "another set-up is building mmcv; waiting for it"; flock 9; }
        else
            build+=.$$
        fi
        if [[ -z $(cached_wheel) ]]; then build_mmcv "$build" "$WHEELS"; fi
    fi
    "$VENV/bin/python" -m pip install --no-deps --no-index --force-reinstall "$(cached_wheel)"
    "$VENV/bin/python" -c 'from mmcv.ops import nms; print("mmcv operators work")'
}

install_mmvmamba() {
    "$VENV/bin/python" -m pip install --no-deps --no-build-isolation -e .
    "$VENV/bin/python" -c 'import mmvmamba, mmvmamba_kernels; print(mmvmamba.__version__)'
}

JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}
[[ -f setup.py && -d requirements ]] || fail "$PROJECT_DIR is not a checkout of mmvmamba: clone the repository to use this."
[[ -f $REQUIREMENTS ]] || fail "STACK=$STACK: there is no $REQUIREMENTS."

if [[ -x $VENV/bin/python ]] && usable_python "$VENV/bin/python" && [[ -f $STAMPS/venv ]]; then
    python=$VENV/bin/python
else
    python=$(find_python)
fi
tag=$("$python" -c 'import sys, sysconfig; print("cp%d%d-%s" % (*sys.version_info[:2], sysconfig.get_platform()))')
version=$("$python" -c 'import platform; print(platform.python_version())')
ACCELERATOR=$(accelerator)
WHEELS=$CACHE/mmcv$(sed -n 's/^mmcv==\([^ ]*\).*/\1/p' requirements/mmcv.txt)-torch$(pinned torch)-$ACCELERATOR-$tag

stack_key=$(content_hash "$REQUIREMENTS")
mmcv_key=$(basename "$WHEELS")-$(content_hash requirements/mmcv.txt)
package_key=$(content_hash setup.py pyproject.toml)
kernels_key=$stack_key-$(find kernels/mmvmamba_kernels/backends/native/{csrc,build.py} -type f -print0 | sort -z | xargs -0 cat | content_hash)
printf 'mmvmamba set-up: Python %s, %s, %s compiler processes\n' "$version" "$ACCELERATOR" "$JOBS"
# Found now rather than after the download.
[[ -f $STAMPS/stack ]] || check_disk
[[ -n $(cached_wheel) ]] || check_compiler "$python"
# Files that the stamps vouch for but that someone has removed are made again.
[[ -e mmvmamba/.mim/configs && -e mmvmamba/.mim/tools ]] || rm -f "$STAMPS/mmvmamba"
[[ -n $(find kernels/mmvmamba_kernels/backends/native/lib -name '*.so' 2>/dev/null) ]] || rm -f "$STAMPS/kernels"

step venv "$tag" '5 s' "environment ${VENV##*/}" make_venv "$python"
step stack "$stack_key" '3 min, 5 GB' 'pinned packages' \
    "$VENV/bin/python" -m pip install --no-deps --require-hashes --only-binary :all: -r "$REQUIREMENTS"
if [[ -n $(cached_wheel) ]]; then duration='15 s'; else duration="$((18 / (JOBS < 18 ? JOBS : 18) + 1)) min, once per machine"; fi
step mmcv "$mmcv_key" "$duration" "mmcv with operators ($ACCELERATOR)" install_mmcv
step mmvmamba "$package_key" '10 s' 'mmvmamba' install_mmvmamba
WITHOUT='the CPU runs the slower PyTorch version' \
    step kernels "$kernels_key" '1 min' 'C++ kernels' "$VENV/bin/python" -m mmvmamba_kernels.build
