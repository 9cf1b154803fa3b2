#!/usr/bin/env bash
# Runs the linters of the active environment, or of .venv, over the whole project.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$PROJECT_DIR"
PATH=$(dirname "$(project_python)"):$PATH

# lint NAME COMMAND...: runs a linter, and says what to do about its complaints.
lint() {
    local name=$1 advice=$2
    shift 2
    printf -- '-- %s\n' "$name"
    "$@" || fail "$name complains, see above. $advice"
}

lint 'ruff check' 'Fix many of them with: ruff check --fix' ruff check .
lint 'ruff format' 'Fix: ruff format' ruff format --check .
lint 'codespell' 'Add a correct name to ignore-words-list in pyproject.toml.' codespell
lint 'shellcheck' 'Its wiki explains each code.' \
    find tools .ci -type f \( -name '*.sh' -o -name run \) \
    -exec shellcheck --external-sources --source-path=SCRIPTDIR {} +
lint 'clang-format' 'Fix: clang-format -i FILE' \
    find kernels -path '*/csrc/*' -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) \
    -exec clang-format --dry-run --Werror {} +
