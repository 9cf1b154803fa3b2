"""Trainings in several processes, on one machine and on two that are made of network namespaces."""

import functools
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import warm
from jobs import CURVES, GLOBAL_BATCH, RECIPES, STEPS, Ended, Machine, curves, free_port

HERE = Path(__file__).resolve().parent
# tiny.py is the integration tests' too.
sys.path.insert(0, str(HERE.parent / "integration"))

from tiny import TASKS, clean_environment, command_line  # noqa: E402


@pytest.fixture(scope="session")
def arguments(project, sample_data, tmp_path_factory) -> Callable[..., list[str]]:
    """Makes the arguments of a tiny training whose losses can be compared."""

    configs = tmp_path_factory.mktemp("configs")

    def make(
        work_dir: Path, processes: int, *options: str, recipe: str = "classifier", hooks: str = ""
    ) -> list[str]:
        task = TASKS[RECIPES[recipe].task]
        config = configs / f"{uuid.uuid4().hex}.py"
        config.write_text(
            f"_base_ = [{str(project / 'configs' / task.config)!r}]\n"
            f"{RECIPES[recipe].changes}"
            "custom_imports = dict(imports=['watched'], allow_failed_imports=False)\n"
            f"custom_hooks = [dict(type='CurveRecorder'), {hooks}]\n"
        )
        batch = f"train_dataloader.batch_size={GLOBAL_BATCH // processes}"
        line = command_line(task, project, sample_data, work_dir)
        flags, length = RECIPES[recipe].flags, RECIPES[recipe].length
        return [str(config), *flags, *line[1:], *length, batch, *options]

    return make


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Callable[..., subprocess.Popen]:
    """Starts commands of the project, and ends what a failing test leaves behind."""
    started: list[subprocess.Popen] = []
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(*command: str | Path, machine: Machine | None = None, **variables: str):
        machine = machine or Machine("127.0.0.1")
        paths = (str(HERE), os.environ.get("PYTHONPATH", ""))
        environment = clean_environment(
            PYTHONPATH=os.pathsep.join(filter(None, paths)), **machine.variables, **variables
        )
        process = warm.Popen(
            [*machine.inside, *map(str, command)],
            cwd=elsewhere,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            # torchrun ends its processes before itself.
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="session")
def launch(project, start) -> Callable[..., list[subprocess.Popen]]:
    """Starts a training: processes on this machine, or one on each of several machines."""
    script = project / "tools/dist_train.sh"

    def run(
        line: list[str], processes: int = 1, machines: tuple[Machine, ...] = (), **variables: str
    ) -> list[subprocess.Popen]:
        if not machines and processes == 1:
            return [start(sys.executable, project / "tools/train.py", *line, **variables)]
        if not machines:
            return [start("bash", script, line[0], str(processes), *line[1:], **variables)]
        variables |= {"MASTER_ADDR": machines[0].address, "PORT": free_port()}
        variables["NNODES"] = str(len(machines))
        command = ("bash", script, line[0], "1", *line[1:])
        return [
            start(*command, machine=machine, NODE_RANK=str(rank), **variables)
            for rank, machine in enumerate(machines)
        ]

    return run


@pytest.fixture(scope="session")
def train(launch) -> Callable[..., list[Ended]]:
    """Trains on this machine or on several, and waits for the end."""

    def run(
        line: list[str], processes: int = 1, machines: tuple[Machine, ...] = (), **variables: str
    ) -> list[Ended]:
        ends = []
        for job in launch(line, processes, machines, **variables):
            output, _ = job.communicate(timeout=300)
            ends.append(Ended(job.returncode, output, time.time()))
        return ends

    return run


@pytest.fixture(scope="session")
def alone(arguments, train, tmp_path_factory) -> Callable[[str], dict[tuple[str, int], float]]:
    """The curves of one process, by recipe."""

    @functools.cache
    def run(recipe: str) -> dict[tuple[str, int], float]:
        work_dir = tmp_path_factory.mktemp("alone")
        (end,) = train(arguments(work_dir, 1, recipe=recipe))
        assert end.code == 0, end.output[-4000:]
        found = curves(work_dir)
        assert len(found) == len(CURVES) * STEPS
        return found

    return run


@pytest.fixture(scope="session")
def pair(arguments, train, two_machines, tmp_path_factory) -> dict[tuple[str, int], float]:
    """The curves of two machines with one process each."""
    work_dir = tmp_path_factory.mktemp("pair")
    for end in train(arguments(work_dir, 2), machines=two_machines):
        assert end.code == 0, end.output[-4000:]
    return curves(work_dir)


@pytest.fixture(scope="session")
def two_machines() -> tuple[Machine, Machine]:
    """Two network namespaces with a cable between them, or the loopback where that is forbidden."""
    names = [f"mmv{os.getpid()}{end}" for end in "ab"]
    cables = [f"v{os.getpid()}{end}" for end in "ab"]
    made = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        _ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        machines = []
        for name, cable, address in zip(names, cables, ("10.77.0.1", "10.77.0.2"), strict=True):
            _ip("link", "set", cable, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            _ip("-n", name, "link", "set", cable, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            inside = ("ip", "netns", "exec", name)
            # The host's name leads to neither of the two.
            machines.append(Machine(address, inside, {"GLOO_SOCKET_IFNAME": cable}))
    except (OSError, subprocess.CalledProcessError):
        machines = [Machine("127.0.0.1"), Machine("127.0.0.1")]
    yield tuple(machines)
    for name in made:
        _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
