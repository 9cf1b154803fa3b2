#!/usr/bin/env bash
# Runs the linters and the whole test suite, in .venv, which is made first where there is none.
#
# usage: bash tools/run_tests.sh [options of pytest]
# Variables: those of tools/setup_env.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cd "$PROJECT_DIR"
bash tools/setup_env.sh
unset PYTHONPATH PYTHONHOME
export VIRTUAL_ENV=$VENV PATH=$VENV/bin:$PATH

hide_unusable_gpu

# The linters are of the quick start's stack: other versions of them want other things.
if [[ -z ${STACK:-} ]]; then bash tools/lint.sh; fi
python tools/misc/audit.py "$REQUIREMENTS" requirements/mmcv.txt
# As the launcher does: on a busy machine, threads that wait by spinning slow everything down.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
printf -- '-- tests (about 35 min on two cores)\n'
exec python -m pytest -o console_output_style=times --durations=15 "$@"
