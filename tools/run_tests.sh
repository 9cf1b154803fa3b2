#!/usr/bin/env bash
# Runs the linters and the whole test suite, in .venv, which is made first where there is none.
#
# usage: bash tools/run_tests.sh [options of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$PROJECT_DIR"
bash tools/setup_env.sh
unset PYTHONPATH PYTHONHOME
export VIRTUAL_ENV=$PROJECT_DIR/.venv PATH=$PROJECT_DIR/.venv/bin:$PATH

hide_unusable_gpu

bash tools/lint.sh
# As the launcher does: on a busy machine, threads that wait by spinning slow everything down.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
printf -- '-- tests (about 22 min on two cores)\n'
exec python -m pytest -o console_output_style=times --durations=15 "$@"
