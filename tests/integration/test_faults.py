"""Trainings that are killed, starved of disk or handed damaged files lose nothing."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from kills import Training, differences, state, train_with_kills
from tiny import TASKS, run_python

from mmvmamba.engine.resume import newest_checkpoint
from mmvmamba.models.checkpoint import CheckpointError

STEPS = 12


@pytest.fixture(scope="module")
def never_killed(project, sample_data, tmp_path_factory):
    """Trains without interruption, once per task and number of processes."""
    done = {}

    def train(name: str, processes: int = 1, steps: int = STEPS) -> Training:
        key = name, processes, steps
        if key not in done:
            folder = tmp_path_factory.mktemp("whole") / "run"
            done[key] = Training(TASKS[name], project, sample_data, folder, steps, processes)
            done[key].finish()
        return done[key]

    return train


def killed(project, sample_data, folder, never_killed, name, processes, kills, steps) -> int:
    """Compares a training with kills to one without; returns the kills within a file's writing."""
    whole = never_killed(name, processes, steps)
    training = Training(TASKS[name], project, sample_data, folder / "run", steps, processes)
    last, hit = train_with_kills(training, kills, seed=kills)
    assert differences(state(whole.last()), state(last)) == []
    return hit


# Of classification, other tests use the training too.
@pytest.mark.parametrize(("name", "steps"), [("mmdet", 4), ("mmpretrain", STEPS), ("mmseg", 4)])
def test_a_killed_training_ends_as_if_it_had_not_been(
    project, sample_data, tmp_path, never_killed, name, steps
):
    killed(project, sample_data, tmp_path, never_killed, name, 1, 1, steps)


@pytest.mark.slow
def test_a_killed_process_of_two_is_started_again(project, sample_data, tmp_path, never_killed):
    killed(project, sample_data, tmp_path, never_killed, "mmpretrain", 2, 1, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_twenty_kills(
    project, sample_data, tmp_path, never_killed, record_property, name, processes
):
    hit = killed(project, sample_data, tmp_path, never_killed, name, processes, 20, 80)
    record_property("kills within the writing of a checkpoint", hit)


@pytest.fixture
def training(project, sample_data, tmp_path, never_killed) -> Training:
    """A classification that has done eleven of its steps, with the checkpoints of two of them."""
    whole = never_killed("mmpretrain")
    copy = Training(TASKS["mmpretrain"], project, sample_data, tmp_path / "run", STEPS)
    shutil.copytree(whole.work_dir, copy.work_dir)
    (copy.work_dir / f"iter_{STEPS}.pth").unlink()
    shutil.copy(copy.work_dir / f"iter_{STEPS - 1}.pth", copy.work_dir / f"iter_{STEPS - 2}.pth")
    last = copy.work_dir / f"iter_{STEPS - 1}.pth"
    (copy.work_dir / "last_checkpoint").write_text(str(last))
    return copy


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(training, damage):
    last = training.work_dir / "iter_11.pth"
    damage(last)
    path, damaged = newest_checkpoint(training.work_dir)
    assert path == training.work_dir / "iter_10.pth"
    assert len(damaged) == 1
    assert str(last) in damaged[0]


def test_the_command_line_goes_on_from_the_whole_one_and_says_so(training, never_killed):
    flip(training.work_dir / "iter_11.pth")
    last = training.finish()
    # iter_10.pth holds step 11 here, so that little is left to do.
    assert differences(state(never_killed("mmpretrain").last()), state(last)) == []
    assert "skipped, an older checkpoint is used: " in training.output()
    assert "checksum" in training.output()


def test_where_none_is_whole_nothing_begins_anew(training):
    for path in training.work_dir.glob("iter_*.pth"):
        cut(path)
    with pytest.raises(CheckpointError, match=r"(?s)iter_11.*iter_10.*Move them away"):
        newest_checkpoint(training.work_dir)


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(training):
    last = training.work_dir / "iter_11.pth"
    cut(last)
    arguments = training.arguments
    place = arguments.index("--resume") + 1
    tool = training.project / "tools/train.py"
    line = [*arguments[:place], last, *arguments[place:]]
    done = run_python(tool, *line, cwd=training.folder, check=False)
    assert done.returncode == 1
    assert f"error: checkpoint {last} is incomplete" in done.stdout


def test_an_interrupted_note_of_the_last_checkpoint_does_no_harm(training):
    (training.work_dir / "last_checkpoint").write_text("")
    path, damaged = newest_checkpoint(training.work_dir)
    assert path.name in ("iter_10.pth", "iter_11.pth")
    assert not damaged


def test_a_checkpoint_on_another_storage_is_not_begun_anew_over(training):
    (training.work_dir / "last_checkpoint").write_text("s3://bucket/run/iter_11.pth")
    with pytest.raises(CheckpointError, match="is not on this disk"):
        newest_checkpoint(training.work_dir)


def test_an_earlier_trainings_checkpoints_are_not_taken_for_newer_ones(training):
    """A training that was begun anew in the same folder has not come as far as the one before."""
    (training.work_dir / "last_checkpoint").write_text("iter_10.pth")
    assert newest_checkpoint(training.work_dir)[0].name == "iter_10.pth"


# Trains, and is killed in the middle of writing step 11's checkpoint.
TORN = """
import os, signal
from mmengine.fileio import LocalBackend
from mmvmamba.engine import cli

put = LocalBackend.put

def torn(self, content, path):
    if "iter_12" in str(path):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, content, path)

LocalBackend.put = torn
cli.train_main()
"""


def test_a_kill_within_the_writing_leaves_the_checkpoint_before(training, never_killed):
    before = (training.work_dir / "iter_11.pth").read_bytes()
    done = run_python("-c", TORN, *training.arguments, cwd=training.folder, check=False)
    assert done.returncode == -9
    assert [path.name for path in training.work_dir.glob("*.part")] == ["iter_12.pth.part"]
    assert not (training.work_dir / "iter_12.pth").exists()
    assert (training.work_dir / "iter_11.pth").read_bytes() == before
    last = training.finish()
    assert differences(state(never_killed("mmpretrain").last()), state(last)) == []
    assert not list(training.work_dir.glob("*.part"))


# A limit to the size of files ends a write as a full disk does, and needs no right to mount one.
STARVED = """
import resource, sys
from mmvmamba.engine import cli

resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
cli.train_main()
"""


@pytest.fixture
def small_disk(tmp_path):
    """A small file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_file_that_cannot_be_written_ends_the_training_and_no_checkpoint(training):
    before = (training.work_dir / "iter_11.pth").read_bytes()
    done = run_python("-c", STARVED, *training.arguments, cwd=training.folder, check=False)
    assert done.returncode == 1
    assert "iter_12.pth was not written: File too large" in done.stdout
    assert "continue with --resume" in done.stdout
    assert (training.work_dir / "iter_11.pth").read_bytes() == before
    assert newest_checkpoint(training.work_dir) == (training.work_dir / "iter_11.pth", [])


def test_a_full_disk_ends_the_training_and_no_checkpoint(training, small_disk):
    size = (training.work_dir / "iter_11.pth").stat().st_size
    work_dir = small_disk / "work_dir"
    work_dir.mkdir()
    shutil.copy(training.work_dir / "iter_11.pth", work_dir)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(free - size // 2))
    arguments = [a.replace(str(training.work_dir), str(work_dir)) for a in training.arguments]
    tool = training.project / "tools/train.py"
    done = run_python(tool, *arguments, cwd=training.folder, check=False)
    assert done.returncode == 1
    assert "iter_12.pth was not written: No space left on device" in done.stdout
    assert newest_checkpoint(work_dir) == (work_dir / "iter_11.pth", [])


# A process that sees another work directory, as on a machine with a disk of its own.
APART = """
import os, sys
from mmvmamba.engine import cli

if os.environ["RANK"] == "1":
    sys.argv[sys.argv.index("--work-dir") + 1] += "_of_its_own"
cli.train_main()
"""


def test_processes_that_would_begin_in_different_places_are_refused(training):
    script = training.folder / "apart.py"
    script.write_text(APART)
    launcher = ["-m", "mmvmamba.engine.launch", "--standalone", "--local-addr=127.0.0.1"]
    line = [*launcher, "--nproc_per_node=2", script, *training.arguments, "--launcher", "pytorch"]
    done = run_python(*line, cwd=training.folder, check=False)
    assert done.returncode == 1
    assert "do not resume from the same checkpoint" in done.stdout
    assert "0: 5, 11, 1: 0, 0" in done.stdout


def losses(training: Training) -> list[float]:
    lines = (line for p in training.work_dir.rglob("scalars.json") for line in p.open())
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.parametrize(
    "name",
    ["mmpretrain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mmdet", "mmseg"))],
)
def test_two_deterministic_runs_are_the_same(project, sample_data, tmp_path, name):
    """Of a config without a seed, with data loader workers."""
    curves = []
    for run in ("first", "second"):
        training = Training(TASKS[name], project, sample_data, tmp_path / run, 4)
        training.arguments.remove("randomness.seed=0")
        training.arguments.append("randomness.deterministic=True")
        # Two interpreters hash strings differently.
        training.finish(cold=run == "second")
        curves.append(losses(training))
    assert len(curves[0]) == 4
    assert curves[0] == curves[1]
