"""tools/slurm_train.sh where srun is a stand-in that starts the tasks on this machine."""

import os

import pytest
from jobs import curves, fault, free_port

# As srun with --kill-on-bad-exit=1: the tasks know their places, and end with the first that fails.
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do
    case $1 in
        -p) shift ;;
        --ntasks=*) tasks=${1#*=} ;;
    esac
    shift
done
for ((task = 0; task < tasks; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=$tasks SLURM_NODELIST='node[1-2]' "$@" &
done
status=0
for ((task = 0; task < tasks; task++)); do
    wait -n || { ((status)) || status=$?; kill $(jobs -p) 2>/dev/null; }
done
exit $status
"""
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames node[1-2]" ] && echo localhost && echo elsewhere
"""


@pytest.fixture
def slurm(project, start, tmp_path):
    """Trains under the stand-ins; returns the exit code and the output."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    def run(line: list[str]) -> tuple[int, str]:
        script = project / "tools/slurm_train.sh"
        place = {"PATH": path, "MASTER_PORT": free_port(), "GPUS": "2"}
        job = start("bash", script, "partition", "job", *line, **place)
        output, _ = job.communicate(timeout=300)
        return job.returncode, output

    return run


def test_two_tasks_train_as_two_machines_do(slurm, pair, arguments, tmp_path):
    code, output = slurm(arguments(tmp_path / "work", 2))
    assert code == 0, output[-4000:]
    assert curves(tmp_path / "work") == pair


@pytest.mark.slow
def test_a_task_that_fails_ends_the_job(slurm, arguments, tmp_path):
    code, output = slurm(arguments(tmp_path / "work", 2, hooks=fault("exception", 3)))
    assert code != 0
    assert "made to fail" in output
