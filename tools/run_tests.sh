#!/usr/bin/env bash
# Runs the linters and the test suite, in .venv, which is made first where there is none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
usage: bash tools/run_tests.sh [--changed [REV]] [options of pytest]

Completes .venv if needed, runs the linters, the audit of packages and the whole test suite, one
worker per core and one more, since some tests wait (-n 0 for none, -n 4 for four), and says at the
end what took how long.

  --changed [REV]  only the test files nearest to what differs from a commit (by default the last
                   one), without set-up, linters and audit: seconds for one module
  -h, --help       this text; pytest's own: .venv/bin/pytest --help

Variables: those of tools/setup_env.sh.
END
}

cores=$(getconf _NPROCESSORS_ONLN)
workers=$((cores + 1))
changed=
for argument in "$@"; do
    case $argument in
        -h | --help) usage && exit ;;
        # A worker takes longer to start than most changes' tests take.
        --changed | --changed=*) workers=0 changed=yes ;;
    esac
done

cd "$PROJECT_DIR"
if [[ -z $changed || ! -x $VENV/bin/pytest ]]; then bash tools/setup_env.sh; fi
unset PYTHONPATH PYTHONHOME
# Hundreds of processes import the project and its tests.
unset PYTHONDONTWRITEBYTECODE
export VIRTUAL_ENV=$VENV PATH=$VENV/bin:$PATH

hide_unusable_gpu

if [[ -z $changed ]]; then
    # The linters are of the quick start's stack: other versions of them want other things.
    if [[ -z ${STACK:-} ]]; then bash tools/lint.sh; fi
    python tools/misc/audit.py "$REQUIREMENTS" "$SOURCES" requirements/uv.txt
fi
# As the launcher does: on a busy machine, threads that wait by spinning slow everything down.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# That many workers leave nothing for threads. Tests of threads ask for theirs.
if ((workers > cores)); then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
# A file's tests share what takes long to make, so a worker gets all of them.
by_file=(--dist loadfile --no-loadscope-reorder)
printf -- '-- tests\n'
exec python -m pytest -o console_output_style=times -n "$workers" "${by_file[@]}" --durations=15 "$@"
