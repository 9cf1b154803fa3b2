"""What dies ends the job on every machine, or has it started again, and nothing hangs."""

import itertools
import re
import time

import pytest
from jobs import curves, fault

# The promise is a minute; the launcher gives the other processes 30 s to end by themselves.
LIMIT = 60
MESSAGES = {
    "exception": ("RuntimeError: made to fail", "ended with exit code 1"),
    "kill": ("", "was killed by SIGKILL"),
    "loader": ("is killed by signal: Killed", "ended with exit code 1"),
}
SHORT = {("exception", 1), ("loader", 1), ("kill", 2)}
CASES = [
    pytest.param(*case, marks=() if case in SHORT else pytest.mark.slow)
    for case in itertools.product(MESSAGES, (1, 2))
]


@pytest.mark.parametrize(("kind", "machines"), CASES)
def test_a_death_ends_the_job(
    kind, machines, arguments, train, two_machines, tmp_path, record_property
):
    work_dir = tmp_path / "work"
    line = arguments(work_dir, 2, "train_dataloader.num_workers=1", hooks=fault(kind, 3))
    ends = train(line, 2, two_machines if machines == 2 else ())
    happened = float((work_dir / "fault").read_text())
    seconds = max(end.time for end in ends) - happened
    record_property("seconds", seconds)
    assert seconds < LIMIT
    own, manner = MESSAGES[kind]
    for end in ends:
        assert end.code == 1, end.output[-4000:]
        last = end.output.strip().splitlines()[-1]
        assert last.startswith("error: ")
    # The machine where it happened shows the traceback and names the process.
    assert own in ends[-1].output
    assert "process 1 of 2 on " in last
    assert manner in last


@pytest.mark.slow
def test_a_killed_launcher_ends_the_job(arguments, launch, two_machines, tmp_path):
    """Its own process, which it cannot end, and the other machine's."""
    line = arguments(tmp_path, 2, "train_cfg.max_epochs=100000")
    first, second = launch(line, 2, two_machines)
    while not (tmp_path / "curves.jsonl").exists():
        time.sleep(0.1)
        assert first.poll() is None
    first.kill()
    # The first's output ends with its last process.
    first.communicate(timeout=LIMIT)
    output, _ = second.communicate(timeout=LIMIT)
    assert second.returncode == 1
    assert output.strip().splitlines()[-1].startswith("error: ")


def test_a_killed_process_is_started_again_and_goes_on(pair, arguments, train, tmp_path):
    """With the losses that it would have had."""
    line = [*arguments(tmp_path, 2, hooks=fault("kill", 3)), "--resume"]
    (end,) = train(line, 2, MAX_RESTARTS="1")
    assert end.code == 0, end.output[-4000:]
    assert "was killed by SIGKILL; restart 1 of 1: all processes start again." in end.output
    # Not one bit may differ: a sum of two is the same in either order.
    assert curves(tmp_path) == pair


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_restarts_end(machines, arguments, train, two_machines, tmp_path):
    """After so many deaths the job ends, on every machine."""
    line = arguments(tmp_path / "work", 2, hooks=fault("every", 1))
    ends = train(line, 2, two_machines if machines == 2 else (), MAX_RESTARTS="2")
    for end in ends:
        assert end.code == 1
        assert end.output.strip().splitlines()[-1].startswith("error: ")
    assert "restart 2 of 2" in ends[-1].output


def test_a_mistake_is_not_repeated(arguments, train, tmp_path):
    line = arguments(tmp_path / "work", 2, "load_from=nowhere.pth")
    (end,) = train(line, 2, MAX_RESTARTS="3")
    assert end.code == 1
    *others, last = end.output.strip().splitlines()
    assert re.match(
        r"error: process \d of 2 on \S+ ended with: .*nowhere\.pth does not exist", last
    )
    assert sum("nowhere.pth does not exist" in line for line in others) == 1
    assert "start again" not in end.output
