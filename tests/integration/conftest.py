"""Tiny trainings that several tests look at."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import TASKS, Trained, command_line


@pytest.fixture(scope="session")
def train_once(project, sample_data, tmp_path_factory) -> Callable[[str], Trained]:
    """Trains a task's model once in the session, however many tests ask for it."""
    from mmvmamba.engine import cli

    done: dict[str, Trained] = {}

    def train(name: str) -> Trained:
        if name not in done:
            task = TASKS[name]
            work_dir = tmp_path_factory.mktemp(name)
            arguments = command_line(task, project, sample_data, work_dir)
            cli.train(cli.parse_train_arguments(arguments))
            config = work_dir / Path(task.config).name
            done[name] = Trained(task, arguments, work_dir, work_dir / task.last, config)
        return done[name]

    return train


@pytest.fixture(params=sorted(TASKS))
def trained(request, train_once) -> Trained:
    """A tiny training of each task."""
    return train_once(request.param)
