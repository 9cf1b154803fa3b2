"""A wheel and an editable install, each in an environment of its own."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
from tiny import TASKS, command_line, run, run_python

# What git does not keep would make the copy slow and the wheel wrong.
LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", "data", "work_dirs", "build", "dist", ".mim", "*.egg-info", "__pycache__"),
    *(".*_cache", ".hypothesis", "golden"),
)


@pytest.fixture(scope="module")
def source(project, tmp_path_factory) -> Path:
    """A copy of the checkout, to build in."""
    copy = tmp_path_factory.mktemp("checkout") / "mmvmamba"
    shutil.copytree(project, copy, ignore=LEFT_OUT)
    return copy


def make_environment(folder: Path) -> Path:
    """Makes an environment that has this one's packages, but not its mmvmamba; gives its Python."""
    run_python("-m", "venv", "--without-pip", folder, cwd=folder.parent, cold=True)
    python = folder / "bin/python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", code, cwd=folder).stdout.strip())
    # A folder named in a .pth file is searched, while .pth files within it, such as those of an
    # editable install, are not read.
    (site / "stack.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *arguments: str | Path) -> None:
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run(python, "-m", "pip", "install", *options, *arguments, cwd=python.parent, PYTHONPATH="")


WHERE = """
import json, sys, mmvmamba, mmvmamba_kernels
from mmvmamba.engine.cli import load_config, project_folder
found = [mmvmamba.__file__, mmvmamba_kernels.__file__, str(project_folder())]
print(json.dumps([*found, *(load_config(name).filename for name in sys.argv[1:])]))
"""


def where(python: Path, cwd: Path, *configs: str) -> list[Path]:
    """Where an environment finds the two packages, the project's folder and configs."""
    out = run(python, "-c", WHERE, *configs, cwd=cwd, PYTHONPATH="").stdout
    return [Path(path).resolve() for path in json.loads(out.splitlines()[-1])]


def test_a_wheel_trains_from_another_directory(source, sample_data, tmp_path):
    wheels = tmp_path / "wheels"
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run_python(*build, "-w", wheels, source, cwd=tmp_path, cold=True)
    python = make_environment(tmp_path / "environment")
    install(python, next(wheels.glob("mmvmamba-*.whl")))

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    package, kernels, project = where(python, elsewhere)
    assert package.is_relative_to(tmp_path)
    assert kernels.is_relative_to(tmp_path)
    assert project == package.parent / ".mim"
    assert (project / "model-index.yml").is_file()

    task = TASKS["mmpretrain"]
    arguments = command_line(task, project, sample_data, elsewhere / "out")[1:]
    config = f"mmvmamba::{task.config}"
    script = project / "tools/dist_train.sh"
    path = f"{python.parent}:/usr/bin:/bin"
    run(
        *("bash", script, config, "1", *arguments),
        cwd=elsewhere,
        cold=True,
        PATH=path,
        VIRTUAL_ENV=str(python.parents[1]),
        PYTHONPATH="",
    )
    assert (elsewhere / "out" / task.last).is_file()


def test_an_editable_install_sees_edits(source, tmp_path):
    python = make_environment(tmp_path / "environment")
    install(python, "-e", source)
    edited = source / "configs/sample/edited.py"
    edited.write_text("_base_ = './vmamba-sample_imagenet.py'")
    package, kernels, project, config = where(python, tmp_path, "mmvmamba::sample/edited.py")
    assert package == (source / "mmvmamba/__init__.py").resolve()
    assert kernels == (source / "kernels/mmvmamba_kernels/__init__.py").resolve()
    assert project == source.resolve()
    assert config == edited.resolve()
    run(python, source / "tools/test.py", "--help", cwd=tmp_path, PYTHONPATH="")
