"""The shell scripts: their usage, what they start, and the set-up with a stand-in for Python."""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

SLURM = {
    "slurm_train.sh": ["part", "job", "config.py", "--amp"],
    "slurm_test.sh": ["part", "job", "config.py", "weights.pth", "--tta"],
}


def bash(script, *arguments, cwd, **variables):
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        env={**os.environ, **variables},
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("dist_train.sh", []),
        ("dist_train.sh", ["config.py"]),
        ("dist_test.sh", ["config.py", "weights.pth"]),
        ("slurm_train.sh", ["partition", "job"]),
        ("slurm_test.sh", ["partition", "job", "config.py"]),
    ],
)
def test_missing_arguments_show_the_usage(project, tmp_path, script, arguments):
    done = bash(project / "tools" / script, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert f"tools/{script}" in done.stderr.replace("\\\n", "")


def test_the_number_of_processes_must_be_one(project, tmp_path):
    done = bash(project / "tools/dist_train.sh", "config.py", "eight", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1
    assert "must be a positive integer, got 'eight'" in done.stderr


@pytest.fixture
def recorded_python(tmp_path, monkeypatch):
    """Stands a recorder of arguments in for the active environment's Python."""
    write_program(
        tmp_path / "bin/python", '#!/bin/sh\nprintf "%s\\n" "$@" "OMP=$OMP_NUM_THREADS"\n'
    )
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def test_one_machine_takes_a_free_port(project, tmp_path, recorded_python):
    done = bash(project / "tools/dist_train.sh", "config.py", "2", "--amp", cwd=tmp_path)
    words = done.stdout.split()
    assert "--standalone" in words
    assert words[words.index("--nproc_per_node=2") + 1] == "--max_restarts=0"
    script = words.index(str(project / "tools/train.py"))
    assert words[script + 1 : script + 5] == ["config.py", "--amp", "--launcher", "pytorch"]


def test_restarts_are_passed_on(project, tmp_path, recorded_python):
    script = project / "tools/dist_train.sh"
    done = bash(script, "config.py", "2", "--resume", cwd=tmp_path, MAX_RESTARTS="7")
    assert "--max_restarts=7" in done.stdout.split()


def test_several_machines_meet_where_they_are_told(project, tmp_path, recorded_python):
    place = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "PORT": "1234"}
    script = project / "tools/dist_test.sh"
    words = bash(script, "config.py", "weights.pth", "4", cwd=tmp_path, **place).stdout.split()
    expected = ["--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=1234"]
    assert [word for word in words if word in expected] == expected
    assert "--standalone" not in words


@pytest.mark.parametrize("script", sorted(SLURM))
def test_slurm_requests(project, tmp_path, recorded_python, script):
    write_program(tmp_path / "bin/srun", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    request = {"GPUS": "4", "CPUS_PER_TASK": "3", "SRUN_ARGS": "--qos=high --time=1"}
    done = bash(project / "tools" / script, *SLURM[script], cwd=tmp_path, **request)
    words = done.stdout.split()
    for word in ("--gres=gpu:4", "--ntasks=4", "--cpus-per-task=3", "--qos=high", "--time=1"):
        assert word in words
    assert words[-len(SLURM[script]) :] == [*SLURM[script][2:], "--launcher", "slurm"]


def test_without_slurm_its_scripts_say_so(project, tmp_path, recorded_python):
    done = bash(project / "tools/slurm_train.sh", "part", "job", "config.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "srun not found" in done.stderr


# A Python that makes environments and wheels out of nothing and writes down what it was asked.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
case "$1 $2 $3" in
    "-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    "-m pip download"*)
        mkdir -p "$TMPDIR/mmcv-2.1.0" && touch "$TMPDIR/mmcv-2.1.0/setup.py"
        tar -czf "${@: -1}/mmcv-2.1.0.tar.gz" -C "$TMPDIR" mmcv-2.1.0 ;;
    "-m pip wheel"*)
        [[ -f "${@: -1}/setup.py" ]] || exit 3
        sleep "${BUILD_SECONDS:-0}"
        if [[ -e $BREAK ]]; then echo 'c++: fatal error: Killed signal'; exit 1; fi
        mkdir -p "${@: -2:1}" && touch "${@: -2:1}/mmcv-2.1.0-cp311-cp311-linux.whl" ;;
    "-m pip"*) ;;
    "-m mmvmamba_kernels.build"*)
        if [[ -e $BREAK_KERNELS ]]; then echo 'found no C++ compiler'; exit 1; fi
        mkdir -p "$CHECKOUT/kernels/mmvmamba_kernels/backends/native/lib"
        touch "$CHECKOUT/kernels/mmvmamba_kernels/backends/native/lib/libmmvmamba_kernels-0.so" ;;
    "-c from mmcv"* | "-c import mmvmamba"*) ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


class Machine:
    """A machine with nothing installed, where set-ups are run for checkouts of the project."""

    def __init__(self, project: Path, root: Path):
        self.project, self.root = project, root
        write_program(root / "python", STAND_IN)
        self.broken, self.calls = root / "broken", root / "calls"
        self.calls.touch()
        (root / "tmp").mkdir()

    def checkout(self, name: str) -> Path:
        folder = self.root / name
        for part in ("tools", "requirements", "setup.py", "pyproject.toml"):
            source = self.project / part
            copy = shutil.copytree if source.is_dir() else shutil.copy
            folder.mkdir(exist_ok=True)
            copy(source, folder / part)
        native = "kernels/mmvmamba_kernels/backends/native"
        shutil.copytree(self.project / native / "csrc", folder / native / "csrc")
        shutil.copy(self.project / native / "build.py", folder / native)
        for link in ("configs", "tools"):
            (folder / "mmvmamba/.mim" / link).mkdir(parents=True)
        return folder

    def environment(self, **variables: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root),
            "PYTHON": str(self.root / "python"),
            "REAL_PYTHON": sys.executable,
            "CALLS": str(self.calls),
            "BREAK": str(self.broken),
            "BREAK_KERNELS": str(self.root / "broken_kernels"),
            "TMPDIR": str(self.root / "tmp"),
            "XDG_CACHE_HOME": str(self.root / "cache"),
            **variables,
        }

    def start(self, folder: Path, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", folder / "tools/setup_env.sh"],
            env=self.environment(CHECKOUT=str(folder), **variables),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def set_up(self, folder: Path, **variables: str) -> tuple[int, str]:
        process = self.start(folder, **variables)
        out, _ = process.communicate(timeout=60)
        return process.returncode, out

    def count(self, words: str) -> int:
        return sum(words in line for line in self.calls.read_text().splitlines())


@pytest.fixture
def machine(project, tmp_path):
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        pytest.skip("this Python has no headers, without which the set-up refuses to begin")
    return Machine(project, tmp_path)


def test_a_set_up_is_done_once_and_a_second_checkout_builds_nothing(machine):
    first, second = machine.checkout("first"), machine.checkout("second")
    status, out = machine.set_up(first)
    assert status == 0, out
    assert machine.count("pip wheel") == 1
    wheels = list((machine.root / "cache/mmvmamba/wheels").rglob("*.whl"))
    assert len(wheels) == 1
    assert "-torch2." in wheels[0].parent.name
    calls = machine.count("-m ")
    status, out = machine.set_up(first)
    assert status == 0
    assert out.count("done before") == 5
    assert machine.count("-m ") == calls
    status, out = machine.set_up(second)
    assert status == 0
    assert machine.count("pip wheel") == 1
    assert machine.count("pip install --no-deps --require-hashes") == 2


def test_a_changed_lock_is_installed_again(machine):
    folder = machine.checkout("first")
    machine.set_up(folder)
    with (folder / "requirements/stack.txt").open("a") as file:
        file.write("# changed\n")
    machine.set_up(folder)
    assert machine.count("--require-hashes --only-binary :all:") == 2
    assert machine.count("pip wheel") == 1


def test_a_failed_build_says_what_to_do_and_goes_on_from_its_sources(machine):
    folder = machine.checkout("first")
    machine.broken.touch()
    status, out = machine.set_up(folder)
    assert status == 1
    assert "set MAX_JOBS=1" in out
    assert "mmcv with operators (cpu)' did not finish" in out
    assert "work_dirs/setup/mmcv.log" in out
    assert not list((machine.root / "cache").rglob("*.whl"))
    machine.broken.unlink()
    assert machine.set_up(folder)[0] == 0
    assert machine.count("pip download") == 1
    assert machine.count("--require-hashes --only-binary :all:") == 1


def test_without_the_compiled_kernels_the_set_up_goes_on(machine):
    folder = machine.checkout("first")
    (machine.root / "broken_kernels").touch()
    status, out = machine.set_up(folder)
    assert status == 0
    assert "not done, the CPU runs the slower PyTorch version" in out
    assert "found no C++ compiler" in out
    (machine.root / "broken_kernels").unlink()
    machine.set_up(folder)
    assert machine.count("-m mmvmamba_kernels.build") == 2


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock on this machine")
def test_two_set_ups_at_once_build_once(machine):
    folders = [machine.checkout("first"), machine.checkout("second")]
    processes = [machine.start(folder, BUILD_SECONDS="3") for folder in folders]
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, out
    assert machine.count("pip wheel") == 1


def test_an_interrupted_set_up_leaves_no_build_behind(machine):
    process = machine.start(machine.checkout("first"), BUILD_SECONDS="47")
    deadline = time.monotonic() + 30
    while not machine.count("pip wheel") and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "interrupted" in out
    left = subprocess.run(["pgrep", "-f", "^sleep 47$"], capture_output=True, text=True)
    assert not left.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PYTHON": "/bin/false"}, "PYTHON=/bin/false is no Python 3.10 to 3.12"),
        ({"CXX": "/bin/false"}, "no working C++17 compiler (/bin/false)"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_installed(machine, variables, message):
    folder = machine.checkout("first")
    status, out = machine.set_up(folder, **variables)
    assert status == 1
    assert message in out
    assert not (folder / ".venv").exists()


def test_a_full_disk_is_seen_before_the_download(machine, tmp_path):
    write_program(tmp_path / "bin/df", '#!/bin/sh\necho head\necho "disk 9 9 1048576 9% /"\n')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    status, out = machine.set_up(machine.checkout("first"), PATH=path)
    assert status == 1
    assert "has 1 GB free; the set-up needs about 8 GB" in out


def test_a_python_is_found_by_running_it(machine, tmp_path):
    """A version manager's shim that fails is passed over."""
    write_program(tmp_path / "bin/python3", "#!/bin/sh\necho 'no version is set' >&2\nexit 127\n")
    write_program(tmp_path / "bin/python3.12", STAND_IN)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    status, out = machine.set_up(machine.checkout("first"), PATH=path, PYTHON="")
    assert status == 0, out
    assert machine.count("-m venv") == 1


def test_the_build_follows_the_gpu(machine, tmp_path):
    """GPU operators where there are a GPU and a fitting nvcc; a word of advice without it."""
    write_program(tmp_path / "bin/nvidia-smi", "#!/bin/sh\necho 9.0\n")
    nvcc = tmp_path / "cuda/bin/nvcc"
    write_program(nvcc, "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    machine_path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    cuda = {"PATH": machine_path, "CUDA_HOME": str(tmp_path / "cuda")}
    status, out = machine.set_up(machine.checkout("first"), **cuda)
    assert status == 0, out
    assert "mmcv with operators (cuda13.0-sm9.0)" in out
    write_program(nvcc, "#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.1'\n")
    status, out = machine.set_up(machine.checkout("second"), **cuda)
    assert "no nvcc of CUDA 13 (12.4 found)" in out
    assert "mmcv with operators (cpu)" in out
    assert machine.count("pip wheel") == 2
