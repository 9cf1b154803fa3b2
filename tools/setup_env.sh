#!/usr/bin/env bash
# Makes .venv with everything the project runs on, or completes one that was interrupted.
#
# Variables: PYTHON (the interpreter to use), MAX_JOBS (compiler processes), CFLAGS (more of mmcv's),
# XDG_CACHE_HOME (mmcv's wheel is kept in mmvmamba/wheels below it; ~/.cache by default),
# STACK (lowest, newest or onedl: the packages of requirements/STACK.txt, in .venv-STACK).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$PROJECT_DIR"
STAMPS=$VENV/setup-stamps
LOGS=$PROJECT_DIR/work_dirs/setup
: "${HOME:=~}"
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/mmvmamba
DISK_GB=8
HEARTBEAT_SECONDS=${HEARTBEAT_SECONDS:-20}
# mmcv's C++ flags, which replace Python's own. No debug information: a fifth of the size.
MMCV_CFLAGS="-O2 -DNDEBUG -g0${CFLAGS:+ $CFLAGS}"

# What the caller's shell has set must not lead pip or Python out of .venv.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1

content_hash() { cat "$@" | cksum | tr ' ' '-'; }

# step NAME KEY DURATION TITLE COMMAND...: runs a command whose result is kept until KEY changes. Output
# goes to a log; every now and then a line says how far it is.
# With WITHOUT set to what is lost, a step that fails is left out instead of ending the set-up.
step() {
    local name=$1 key=$2 duration=$3 title=$4 log=$LOGS/$1.log begin=$SECONDS last=$SECONDS now
    shift 4
    if [[ -f $STAMPS/$name && $(<"$STAMPS/$name") == "$key" ]]; then
        printf -- '-- %s: already done\n' "$title"
        return
    fi
    printf -- '-- %s (about %s)\n' "$title" "$duration"
    mkdir -p "$LOGS"
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
            now=$(tail -n 30 "$log" | grep -aoE '^ *\[[0-9]+/[0-9]+\]' | tail -n 1 || true)
            now=${now:+files compiled: ${now// /}}
            [[ -n $now ]] || now=$(tail -n 1 "$log" | tr -d '\r' | cut -c1-80)
            printf -- '   %s: %s\n' "$(elapsed $((SECONDS - begin)))" "$now"
        fi
    done
    if wait "$CHILD"; then
        mkdir -p "$STAMPS"
        printf '%s\n' "$key" >"$STAMPS/$name"
        printf -- '   finished in %s\n' "$(elapsed $((SECONDS - begin)))"
    elif [[ -n ${WITHOUT:-} ]]; then
        printf -- '   not done, %s (%s):\n' "$WITHOUT" "$log"
        tail -n 3 "$log" | cut -c1-200
    else
        printf '\n%s\n\n' "$(tail -n 15 "$log")" >&2
        advise "$log"
        fail "step '$title' did not finish; its whole log is $log. Run the same command again to continue."
    fi
    CHILD=
}

# An interrupted set-up leaves no compiler or download running behind it.
CHILD=
trap 'kill -- -${CHILD:-nothing} 2>/dev/null
    printf "\ninterrupted; run the same command again to continue.\n" >&2; exit 130' INT TERM

# advise LOG: what to do about a failure that the log tells of.
advise() {
    local pattern advice
    while IFS='=' read -r pattern advice; do
        if grep -qiE "$pattern" "$1"; then printf '%s\n' "$advice" >&2 && return; fi
    done <<END
No space left|disk quota=The disk is full: about $DISK_GB GB are needed in $PROJECT_DIR.
DO NOT MATCH THE HASHES|HashMismatch=A downloaded file is not the one that was tested; a mirror may be at fault.
NewConnectionError|ConnectTimeout|ReadTimeout|Temporary failure in name|SSLError=The package index was not reached: check the network, or the index in pip config list.
No matching distribution=The package index has no file for this system: $(uname -sm), $("$VENV/bin/python" -V 2>&1).
Killed|out of memory|cannot allocate=The machine ran out of memory: set MAX_JOBS=1 and try again.
END
}

usable_python() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

# uv finds a Python that fits, or gets one; where uv cannot be had, python3 has to fit.
make_venv() {
    local python=${PYTHON:-python3}
    "$UV" --version || "$python" -m pip install --upgrade --target "$UV_FOLDER" \
        --no-deps --require-hashes --only-binary :all: -r requirements/uv.txt || true
    # Cleared: another Python's leftovers would be found before the new one's packages.
    UV_PYTHON_INSTALL_DIR=$CACHE/python "$UV" venv --clear --python "${PYTHON:->=3.10,<3.14}" "$VENV" ||
        "$python" -m venv --clear "$VENV" || rm -rf "$VENV"
    usable_python "$VENV/bin/python" ||
        fail "no Python 3.10 to 3.13 with venv: PYTHON=$python is $("$python" -V 2>&1 || echo 'none that runs'). Install one (Debian and Ubuntu: apt-get install python3.11 python3.11-venv python3.11-dev), or set PYTHON=/path/to/python."
}

# Makes uv use the index that pip was told of.
use_index_of_pip() {
    local key value
    # Sorted as pip ranks them: a later value takes the place of an earlier one.
    while IFS='=' read -r key value; do
        value=${value//\'/}
        value=${value//\\n/ }
        case ${key##*.} in
            index-url) export UV_DEFAULT_INDEX=$value ;;
            extra-index-url) export UV_INDEX=$value ;;
            find-links) export UV_FIND_LINKS=${value// /,} ;;
            no-index) export UV_OFFLINE=$value ;;
            trusted-host) export UV_INSECURE_HOST=$value ;;
            cert) export SSL_CERT_FILE=$value ;;
            proxy) export ALL_PROXY=$value ;;
        esac
    done < <("${PYTHON:-python3}" -m pip config list | grep -E '^(global|install|:env:)\.' | sed 's/^:/~/' | LC_ALL=C sort)
    # Any index may have the version, and the system's certificates count, as with pip.
    export UV_INDEX_STRATEGY=unsafe-best-match UV_SYSTEM_CERTS=1
    # As pip does: where PYTHONDONTWRITEBYTECODE is set, every start would compile what it imports.
    export UV_COMPILE_BYTECODE=1
}

# By uv, in a tenth of pip's time; where uv does not manage, by pip.
install_stack() {
    set -- pip install --no-deps --require-hashes --only-binary :all: -r "$REQUIREMENTS"
    use_index_of_pip
    if "$UV" "$@" --python "$VENV/bin/python"; then return; fi
    echo 'not by uv: pip installs, which takes longer'
    "$VENV/bin/python" -m pip --version || "$VENV/bin/python" -m ensurepip
    "$VENV/bin/python" -m "$@"
}

check_compiler() {
    local cxx=${CXX:-c++} standard=c++17 include
    # Those of torch's headers.
    [[ $(printf '2.14\n%s\n' "$(pinned torch "$REQUIREMENTS")" | sort -V | head -n 1) != 2.14 ]] || standard=c++20
    printf '#include <vector>\nint main() { std::vector<int> v(1); return v[0]; }\n' |
        "$cxx" -std=$standard -x c++ - -o /dev/null >/dev/null 2>&1 ||
        fail "no working ${standard^} compiler ($cxx). mmcv's operators are compiled here once: install one (Debian and Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or set CXX."
    include=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    [[ -f $include/Python.h ]] ||
        fail "$include/Python.h is missing, which compiling mmcv's operators needs: install Python's headers (Debian and Ubuntu: apt-get install python3-dev for this version), or set PYTHON to another Python."
}

# pinned PACKAGE LOCK: the version that a lock has of a package.
pinned() { sed -n "s/^$1==\([^ ;\\\\]*\).*/\1/p" "$2" | head -n 1; }

find_nvcc() { command -v "${CUDA_HOME:-/nonexistent}/bin/nvcc" nvcc /usr/local/cuda/bin/nvcc | head -n 1; }

# Prints what mmcv's operators are built for: 'cpu', or the CUDA version and the GPUs' capabilities.
accelerator() {
    local capabilities nvcc release wanted
    capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd+ -) || true
    wanted=$(sed -n 's/^nvidia-cuda-runtime[-cu0-9]*==\([0-9]*\).*/\1/p' "$REQUIREMENTS" | head -n 1)
    nvcc=$(find_nvcc) || true
    release=$("${nvcc:-false}" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p') || true
    if [[ ! $capabilities =~ ^[0-9] ]]; then
        echo cpu
    elif [[ ${release%%.*} == "$wanted" ]]; then
        echo "cuda$release-sm$capabilities"
    else
        printf 'note: this machine has a GPU, but no nvcc of CUDA %s (%s found). mmcv is built for the CPU, and\n      detection on the GPU needs its GPU operators: install the CUDA %s toolkit and run this again,\n      or set CUDA_VISIBLE_DEVICES=-1 to run on the CPU.\n' \
            "$wanted" "${release:-none}" "$wanted" >&2
        echo cpu
    fi
}

# Makes the wheels in the folder, which is kept until then: what was compiled before an interruption
# is not compiled again.
build_sources() {
    local folder=$1 source=$1/sources archive
    export PYTHONPATH=$TOOLS_DIR/misc/mmcv_build
    if [[ ! -d $source ]]; then
        mkdir -p "$folder/unpacked"
        "$VENV/bin/python" -m pip download --no-deps --no-build-isolation --no-binary :all: \
            --require-hashes -r "$SOURCES" -d "$folder"
        for archive in "$folder"/*.tar.gz; do tar -xzf "$archive" -C "$folder/unpacked"; done
        # mmcv's setup.py asks for C++17, which torch 2.14's headers refuse; torch itself asks for
        # what its headers need.
        sed -i.orig "s/\['-std=c++17'\]/[]/" "$folder"/unpacked/*mmcv-*/setup.py
        mv "$folder/unpacked" "$source"
    fi
    if [[ $ACCELERATOR == cpu ]]; then
        export FORCE_CUDA=0 CUDA_VISIBLE_DEVICES=-1
    else
        export FORCE_CUDA=1
        CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$(find_nvcc)")")")
        export CUDA_HOME
    fi
    MMCV_WITH_OPS=1 CFLAGS=$MMCV_CFLAGS MAX_JOBS=$JOBS PATH=$VENV/bin:$PATH \
        "$VENV/bin/python" -m pip wheel -v --no-deps --no-build-isolation -w "$folder/out" "$source"/*/
}

# All wheels are there, not some of an interrupted move.
cached() { [[ $(find "$WHEELS" -name '*.whl' 2>/dev/null | wc -l) -eq $(grep -c '==' "$SOURCES") ]]; }

install_sources() {
    local build=$WHEELS.build
    mkdir -p "$WHEELS"
    # One set-up builds; another that starts meanwhile waits here and takes its wheels.
    if command -v flock >/dev/null; then
        echo 'waiting while another set-up builds mmcv'
        exec 9>"$WHEELS.lock"
        flock 9
    else
        build+=.$$
    fi
    if ! cached; then
        build_sources "$build"
        # Moved within one file system: other set-ups see a whole wheel or none.
        mv "$build"/out/*.whl "$WHEELS/"
        rm -rf "$build"
    fi
    "$VENV/bin/python" -m pip install --no-deps --no-index --force-reinstall "$WHEELS"/*.whl
    "$VENV/bin/python" -c 'from mmcv.ops import nms; print("mmcv operators work")'
}

install_mmvmamba() {
    "$VENV/bin/python" -m pip install --no-deps --no-build-isolation -e .
    "$VENV/bin/python" -c 'import mmvmamba, mmvmamba_kernels; print(mmvmamba.__version__)'
}

JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}
[[ -f setup.py && -d requirements ]] || fail "$PROJECT_DIR is not a checkout of mmvmamba: clone the repository to use this."
[[ -f $REQUIREMENTS ]] || fail "STACK=$STACK: there is no $REQUIREMENTS."

UV_FOLDER=$CACHE/uv-$(pinned uv requirements/uv.txt)
# The name on the PATH is no proof: a version manager's shim exists for versions that are not chosen.
UV=uv
uv --version >/dev/null 2>&1 || UV=$UV_FOLDER/bin/uv
ACCELERATOR=$(accelerator)
printf 'mmvmamba set-up: %s, %s compiler processes\n' "$ACCELERATOR" "$JOBS"

usable_python "$VENV/bin/python" || rm -f "$STAMPS/venv"
step venv made '5 s' "environment ${VENV##*/}" make_venv
read -r version tag < <("$VENV/bin/python" -c 'import platform, sys, sysconfig
print(platform.python_version(), "cp%d%d-%s" % (*sys.version_info[:2], sysconfig.get_platform()))')
printf '   Python %s\n' "$version"

built=$(sed -n 's/^\([^ =]*\)==\([^ ]*\).*/\1\2/p' "$SOURCES" | paste -sd- -)
WHEELS=$CACHE/wheels/$built-torch$(pinned torch "$REQUIREMENTS")-$ACCELERATOR-$tag
WHEELS+=-flags$(printf '%s' "$MMCV_CFLAGS" | content_hash)
stack_key=$(content_hash "$REQUIREMENTS")
mmcv_key=$(basename "$WHEELS")-$(content_hash "$SOURCES")
package_key=$(content_hash setup.py pyproject.toml)
kernels_key=$(find kernels/mmvmamba_kernels/backends/native/{csrc,compiler.py} -type f -print0 | sort -z | xargs -0 cat | content_hash)
# Found now rather than after the download.
free=$(df -Pk "$PROJECT_DIR" | awk 'NR == 2 { print int($4 / 1048576) }')
[[ -f $STAMPS/stack ]] || ((free >= DISK_GB)) ||
    fail "$PROJECT_DIR has $free GB free; the set-up needs about $DISK_GB GB (torch brings its CUDA libraries)."
cached || check_compiler
# Files that the stamps vouch for but that someone has removed are made again.
[[ -e mmvmamba/.mim/configs && -e mmvmamba/.mim/tools ]] || rm -f "$STAMPS/mmvmamba"
[[ -n $(find kernels/mmvmamba_kernels/backends/native/lib -name '*.so' 2>/dev/null) ]] || rm -f "$STAMPS/kernels"

step stack "$stack_key" '1 to 3 min, 5 GB' 'pinned packages' install_stack
if cached; then duration='15 s'; else duration="$((18 / (JOBS < 18 ? JOBS : 18) + 1)) min, once per machine"; fi
step mmcv "$mmcv_key" "$duration" "mmcv with operators ($ACCELERATOR)" install_sources
step mmvmamba "$package_key" '10 s' 'mmvmamba' install_mmvmamba
WITHOUT='the CPU runs the slower PyTorch version' \
    step kernels "$kernels_key" '20 s' 'C++ kernels' "$VENV/bin/python" -m mmvmamba_kernels.build
