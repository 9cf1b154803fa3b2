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


@pytest.fixture(autouse=True)
def no_other_stack(monkeypatch):
    """Scripts read STACK, which the tests of another stack are run with."""
    monkeypatch.delenv("STACK", raising=False)


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


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_of_the_tests_sets_nothing_up(project, tmp_path, option):
    # Beside the two, nothing: a set-up or a linter would not be found.
    for name in ("common.sh", "run_tests.sh"):
        shutil.copy(project / "tools" / name, tmp_path)
    done = bash(tmp_path / "run_tests.sh", option, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: bash tools/run_tests.sh")
    assert "--changed" in done.stdout


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


def test_a_port_alone_is_that_of_one_machine(project, tmp_path, recorded_python):
    done = bash(project / "tools/dist_train.sh", "config.py", "2", cwd=tmp_path, PORT="1234")
    words = ["--nnodes=1", "--node_rank=0", "--master_addr=127.0.0.1", "--master_port=1234"]
    assert [word for word in done.stdout.split() if word in words] == words


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, "checkout/.venv"),
        ({"CONDA_DEFAULT_ENV": "base"}, "checkout/.venv"),
        ({"CONDA_DEFAULT_ENV": "own"}, "active"),
        ({"VIRTUAL_ENV": "/own"}, "active"),
    ],
    ids=str,
)
def test_the_active_environment_comes_before_the_quick_starts(
    project, tmp_path, monkeypatch, variables, place
):
    (tmp_path / "checkout/tools").mkdir(parents=True)
    common = shutil.copy(project / "tools/common.sh", tmp_path / "checkout/tools")
    for folder in ("checkout/.venv", "active"):
        write_program(tmp_path / folder / "bin/python", "")
    write_program(tmp_path / "which", f"source '{common}' && project_python")
    for name in ("VIRTUAL_ENV", "CONDA_DEFAULT_ENV"):
        monkeypatch.delenv(name, raising=False)
    path = f"{tmp_path / 'active/bin'}:{os.environ['PATH']}"
    done = bash(tmp_path / "which", cwd=tmp_path, PATH=path, **variables)
    assert done.stdout.strip() == str(tmp_path / place / "bin/python")


# What the quick start calls, one program under several names.
STEP = """#!/bin/sh
printf '%s %s\\n' "$0" "$*" >>calls
case $0 in
    *setup_env.sh) mkdir -p .venv/setup-stamps && echo mmcv-gpu- >.venv/setup-stamps/mmcv ;;
    *dist_train.sh)
        if [ -e broken ]; then echo 'RuntimeError: made to fail'; exit 1; fi
        echo '/elsewhere/epoch_4.pth' >work_dirs/quickstart/last_checkpoint ;;
    *dist_test.sh) echo "x coco/bbox_mAP: $BBOX  coco/segm_mAP: $SEGM  data_time: 0.1" ;;
esac
"""


@pytest.fixture
def quick_start(project, tmp_path):
    """Runs the quick start in a folder where it finds stand-ins for all that it calls."""
    for name in ("quickstart.sh", "common.sh"):
        (tmp_path / "tools").mkdir(exist_ok=True)
        shutil.copy(project / "tools" / name, tmp_path / "tools")
    for name in ("tools/setup_env.sh", "tools/dist_train.sh", "tools/dist_test.sh"):
        write_program(tmp_path / name, STEP)
    write_program(tmp_path / ".venv/bin/python", STEP)
    for name in ("configs/sample/_base_/a.py", "configs/sample/b.py", "data/sample/manifest.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return lambda **scores: bash(tmp_path / "tools/quickstart.sh", cwd=tmp_path, **scores)


@pytest.mark.parametrize(
    ("bbox", "segm", "status"), [("0.31", "0.30", 0), ("0.31", "0.29", 1), ("0.29", "0.31", 1)]
)
def test_the_quick_start_expects_boxes_and_masks(quick_start, bbox, segm, status):
    done = quick_start(BBOX=bbox, SEGM=segm)
    assert f"bbox mAP {bbox}, segm mAP {segm}\n" in done.stdout
    assert "Checkpoint: work_dirs/quickstart/epoch_4.pth" in done.stdout
    assert done.returncode == status
    assert ("does not learn" in done.stderr) == bool(status)


def test_the_quick_start_goes_on_where_it_failed(quick_start, tmp_path):
    (tmp_path / "broken").touch()
    done = quick_start(BBOX="0.4", SEGM="0.4")
    assert done.returncode == 1
    assert "RuntimeError: made to fail" in done.stdout
    assert "train did not finish" in done.stderr
    (tmp_path / "broken").unlink()
    for trainings in (2, 2):
        assert quick_start(BBOX="0.4", SEGM="0.4").returncode == 0
        calls = (tmp_path / "calls").read_text()
        assert calls.count("tools/dist_train.sh") == trainings


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
STAND_IN = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$CALLS"
case "$1 $2 $3" in
    "-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    "-m pip download"*)
        for name in $(sed -n 's/^\([^ =]*\)==\([^ ]*\).*/\1-\2/p' "${@: -3:1}"); do
            mkdir -p "$TMPDIR/$name" && touch "$TMPDIR/$name/setup.py"
            tar -czf "${@: -1}/$name.tar.gz" -C "$TMPDIR" "$name"
        done ;;
    "-m pip wheel"*)
        out=$8
        printf 'flags %s\n' "$CFLAGS" >>"$CALLS"
        sleep "${BUILD_SECONDS:-0}"
        if [[ -e $BREAK ]]; then echo 'c++: fatal error: Killed signal'; exit 1; fi
        mkdir -p "$out"
        for source in "${@:9}"; do
            [[ -f $source/setup.py ]] || exit 3
            touch "$out/$(basename "$source")-py3-none-any.whl"
        done ;;
    "-m pip install")
        if [[ $* == *"/uv.txt" ]]; then
            if [[ -e $BREAK_UV ]]; then echo 'No matching distribution found for uv'; exit 1; fi
            mkdir -p "$6/bin" && cp "$UV_STAND_IN" "$6/bin/uv"
        fi ;;
    "-m pip config") cat "$PIP_SETTINGS" ;;
    "-m pip"* | "-m ensurepip"*) ;;
    "-m mmvmamba_kernels.build"*)
        if [[ -e $BREAK_KERNELS ]]; then echo 'found no C++ compiler'; exit 1; fi
        mkdir -p "$CHECKOUT/kernels/mmvmamba_kernels/backends/native/lib"
        touch "$CHECKOUT/kernels/mmvmamba_kernels/backends/native/lib/libmmvmamba_kernels-0.so" ;;
    "-c from mmcv"* | "-c import mmvmamba"*) ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


# A uv that makes the same environments, and installs unless it is told to break.
UV_STAND_IN = """#!/usr/bin/env bash
printf 'uv %s\\n' "$*" >>"$CALLS"
case "$1" in
    --version) ;;
    venv)
        if [[ -e $BREAK_UV_PYTHON ]]; then
            echo 'error: Failed to download https://github.com/'; exit 2
        fi
        mkdir -p "${@: -1}/bin" && cp "$PYTHON_STAND_IN" "${@: -1}/bin/python" ;;
    pip)
        env | grep -E '^(UV_|SSL_CERT_FILE|ALL_PROXY)' >>"$CALLS"
        if [[ -e $BREAK_UV_INSTALL ]]; then echo 'error: the index has no such file'; exit 1; fi ;;
esac
"""


class Machine:
    """A machine with nothing installed, where set-ups are run for checkouts of the project."""

    def __init__(self, project: Path, root: Path):
        self.project, self.root = project, root
        write_program(root / "python", STAND_IN)
        write_program(root / "uv", UV_STAND_IN)
        # A version manager's shim of a uv that is not chosen.
        write_program(root / "bin/uv", "#!/bin/sh\necho 'no version is set' >&2\nexit 127\n")
        self.path = f"{root / 'bin'}:{os.environ['PATH']}"
        self.broken, self.calls = root / "broken", root / "calls"
        self.pip_settings = root / "pip_settings"
        self.calls.touch()
        self.pip_settings.touch()
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
        shutil.copy(self.project / native / "compiler.py", folder / native)
        for link in ("configs", "tools"):
            (folder / "mmvmamba/.mim" / link).mkdir(parents=True)
        return folder

    def environment(self, **variables: str) -> dict[str, str]:
        return {
            "PATH": self.path,
            "HOME": str(self.root),
            "PYTHON": str(self.root / "python"),
            "REAL_PYTHON": sys.executable,
            "CALLS": str(self.calls),
            "BREAK": str(self.broken),
            "BREAK_KERNELS": str(self.root / "broken_kernels"),
            "BREAK_UV": str(self.root / "broken_uv"),
            "BREAK_UV_INSTALL": str(self.root / "broken_uv_install"),
            "BREAK_UV_PYTHON": str(self.root / "broken_uv_python"),
            "PYTHON_STAND_IN": str(self.root / "python"),
            "UV_STAND_IN": str(self.root / "uv"),
            "PIP_SETTINGS": str(self.pip_settings),
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

    def lines(self) -> list[str]:
        return self.calls.read_text().splitlines()

    def count(self, words: str) -> int:
        return sum(words in line for line in self.lines())


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
    assert out.count("already done") == 5
    assert machine.count("-m ") == calls
    status, out = machine.set_up(second)
    assert status == 0
    assert machine.count("pip wheel") == 1
    assert machine.count("uv pip install --no-deps --require-hashes") == 2
    # One uv for both, and pip for nothing that uv has done.
    assert machine.count("-r requirements/uv.txt") == 1
    assert machine.count("-r requirements/stack.txt") == 2


def test_another_stack_has_its_own_environment_packages_and_wheels(machine):
    """OneDL's packages are built beside mmcv, and all of them are kept."""
    folder = machine.checkout("first")
    for stack in ("", "onedl", "onedl"):
        status, out = machine.set_up(folder, STACK=stack)
        assert status == 0, out
    assert machine.count("-r requirements/onedl.txt") == 1
    assert machine.count("-r requirements/onedl-sources.txt") == 1
    assert machine.count("pip wheel") == 2
    assert {path.name for path in folder.glob(".venv*")} == {".venv", ".venv-onedl"}
    wheels = list((machine.root / "cache/mmvmamba/wheels").rglob("*.whl"))
    own = [path for path in wheels if "onedl" in path.parent.name]
    assert sorted(path.name.split("-")[1] for path in own) == [
        "mmcv", "mmdetection", "mmpretrain", "mmsegmentation",
    ]  # fmt: skip
    assert len(wheels) == 5
    # One that is missing is no finished build.
    own[0].unlink()
    second = machine.checkout("second")
    assert machine.set_up(second, STACK="onedl")[0] == 0
    assert machine.count("pip wheel") == 3
    assert own[0].exists()


def test_a_uv_on_the_path_is_taken(machine):
    write_program(machine.root / "bin/uv", UV_STAND_IN)
    status, out = machine.set_up(machine.checkout("first"))
    assert status == 0, out
    assert machine.count("uv venv --clear") == 1
    assert machine.count("uv pip install") == 1
    assert machine.count("requirements/uv.txt") == 0


@pytest.mark.parametrize("broken", ["broken_uv", "broken_uv_install"])
def test_without_uv_pip_installs(machine, broken):
    """Where uv cannot be had, and where it does not manage what pip manages."""
    (machine.root / broken).touch()
    folder = machine.checkout("first")
    status, out = machine.set_up(folder)
    assert status == 0, out
    assert machine.count("-m venv") == (broken == "broken_uv")
    assert machine.count("-m pip install --no-deps --require-hashes --only-binary :all:") == 1
    assert machine.count("-m pip wheel") == 1
    calls = machine.count("")
    status, out = machine.set_up(folder)
    assert status == 0
    assert out.count("already done") == 5
    assert machine.count("-m ") == sum("-m " in line for line in machine.lines()[:calls])


def test_uv_gets_the_index_of_pip(machine):
    """The environment over the command's settings over the global ones, and no others."""
    machine.pip_settings.write_text(
        ":env:.find-links='/a /b'\n"
        ":env:.index-url='https://me:secret@mirror/simple?a=b'\n"
        "download.index-url='https://download/simple'\n"
        "global.cert='/certificates.pem'\n"
        "global.extra-index-url='\\nhttps://one/simple\\nhttps://two/simple'\n"
        "global.index-url='https://global/simple'\n"
        "global.timeout='60'\n"
        "global.trusted-host='global'\n"
        "install.index-url='https://install/simple'\n"
        "install.trusted-host='install'\n"
        "wheel.index-url='https://wheel/simple'\n"
    )
    status, out = machine.set_up(machine.checkout("first"))
    assert status == 0, out
    told = dict(line.split("=", 1) for line in machine.lines() if line.startswith(("UV_", "SSL_")))
    assert told["UV_DEFAULT_INDEX"] == "https://me:secret@mirror/simple?a=b"
    assert told["UV_INDEX"].split() == ["https://one/simple", "https://two/simple"]
    assert told["UV_FIND_LINKS"] == "/a,/b"
    assert told["UV_INSECURE_HOST"] == "install"
    assert told["SSL_CERT_FILE"] == "/certificates.pem"
    assert "secret" not in out


def test_a_changed_lock_is_installed_again(machine):
    folder = machine.checkout("first")
    machine.set_up(folder)
    with (folder / "requirements/stack.txt").open("a") as file:
        file.write("# changed\n")
    machine.set_up(folder)
    assert machine.count("-r requirements/stack.txt") == 2
    assert machine.count("pip wheel") == 1


def test_other_compiler_flags_are_another_wheel(machine):
    """The caller's flags come after the set-up's own, which are what optimises the operators."""
    folder = machine.checkout("first")
    for flags in ("", "-march=native -I/a folder", ""):
        status, out = machine.set_up(folder, CFLAGS=flags)
        assert status == 0, out
    assert machine.count("flags -O2 -DNDEBUG -g0") == 2
    assert machine.count("-g0 -march=native -I/a folder") == 1
    assert len(list((machine.root / "cache").rglob("*.whl"))) == 2


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
    assert machine.count("-r requirements/stack.txt") == 1


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
        ({"PYTHON": "/bin/false"}, "with venv: PYTHON=/bin/false is none that runs"),
        ({"CXX": "/bin/false"}, "no working C++17 compiler (/bin/false)"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_installed(machine, variables, message):
    folder = machine.checkout("first")
    status, out = machine.set_up(folder, **variables)
    assert status == 1
    assert message in out
    assert machine.count("-r requirements/stack.txt") == 0
    assert not (machine.root / "cache/mmvmamba/wheels").exists()


def test_a_full_disk_is_seen_before_the_download(machine, tmp_path):
    write_program(tmp_path / "bin/df", '#!/bin/sh\necho head\necho "disk 9 9 1048576 9% /"\n')
    status, out = machine.set_up(machine.checkout("first"))
    assert status == 1
    assert "has 1 GB free; the set-up needs about 8 GB" in out


def test_uv_finds_a_python_or_gets_one(machine, tmp_path):
    """The system's is too new. Where no other can be had, that is said, with uv's reason."""
    write_program(
        tmp_path / "bin/python3",
        '#!/bin/sh\n[ "$1" != -c ] || exit 1\n'
        '[ "$2" != venv ] || { mkdir -p "$4/bin" && exec cp "$0" "$4/bin/python"; }\n'
        f'exec {machine.root / "python"} "$@"\n',
    )
    folder = machine.checkout("first")
    (machine.root / "broken_uv_python").touch()
    status, out = machine.set_up(folder, PYTHON="")
    assert status == 1
    assert "Failed to download https://github.com/" in out
    assert "no Python 3.10 to 3.13" in out
    assert machine.count("-r requirements/stack.txt") == 0
    (machine.root / "broken_uv_python").unlink()
    status, out = machine.set_up(folder, PYTHON="")
    assert status == 0, out
    assert machine.count("uv venv --clear --python >=3.10,<3.14") == 2


def test_mmcvs_build_finds_its_version_on_every_python(project):
    code = "def version():\n exec('found = 2')\n return locals()['found']\nprint(version())"
    path = str(project / "tools/misc/mmcv_build")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "2\n", done.stderr


def test_the_build_follows_the_gpu(machine, tmp_path):
    """GPU operators where there are a GPU and a fitting nvcc; a word of advice without it."""
    write_program(tmp_path / "bin/nvidia-smi", "#!/bin/sh\necho 9.0\n")
    nvcc = tmp_path / "cuda/bin/nvcc"
    write_program(nvcc, "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    cuda = {"CUDA_HOME": str(tmp_path / "cuda")}
    status, out = machine.set_up(machine.checkout("first"), **cuda)
    assert status == 0, out
    assert "mmcv with operators (cuda13.0-sm9.0)" in out
    write_program(nvcc, "#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.1'\n")
    status, out = machine.set_up(machine.checkout("second"), **cuda)
    assert "no nvcc of CUDA 13 (12.4 found)" in out
    assert "mmcv with operators (cpu)" in out
    assert machine.count("pip wheel") == 2
