"""tools/slurm_train.sh where srun is a stand-in that starts the tasks on this machine."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor, as_completed

import pytest
import warm
from jobs import curves, fault, free_port

# What every task of a job is, which the test starts.
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do
    case $1 in
        -p) shift ;;
        --ntasks=*) export SLURM_NTASKS=${1#*=} ;;
    esac
    shift
done
SLURM_NODELIST='node[1-2]' exec "$@"
"""
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames node[1-2]" ] && echo localhost && echo elsewhere
"""


def wait(job: subprocess.Popen) -> tuple[int, str]:
    """A job's exit code and output."""
    output, _ = job.communicate(timeout=300)
    return job.returncode, output


@pytest.fixture
def slurm(project, start, tmp_path):
    """Trains under the stand-ins; returns exit code and output of what ended last, or failed."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    def run(line: list[str]) -> tuple[int, str]:
        script = project / "tools/slurm_train.sh"
        place = {"PATH": path, "MASTER_PORT": free_port(), "GPUS": "2"}
        command = ["bash", str(script), "partition", "job", *line]
        command, left = warm.started_by(command, tmp_path, os.environ | place)
        assert left["SLURM_NTASKS"] == "2"
        place |= {name: value for name, value in left.items() if name.startswith("SLURM_")}
        jobs = [
            start(*command, **place, SLURM_PROCID=task, SLURM_LOCALID=task) for task in ("0", "1")
        ]
        with ThreadPoolExecutor() as pool:
            # As srun with --kill-on-bad-exit=1: all end with the first that fails.
            for ended in as_completed([pool.submit(wait, job) for job in jobs]):
                if ended.result()[0]:
                    for job in jobs:
                        job.terminate()
                    break
        return ended.result()

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
