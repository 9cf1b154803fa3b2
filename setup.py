"""Adds to the wheel what stands beside the code: configs, tools, the index, the demo's page.

Everything else stands in pyproject.toml. An isolated build needs setuptools alone. Compiled kernels
go into the wheel if they are asked for: MMVMAMBA_WITH_EXT=cpu builds those for the CPU, which needs
a C++ compiler and no PyTorch; MMVMAMBA_WITH_EXT=1 needs PyTorch, and builds those for NVIDIA GPUs
too if that PyTorch was built for CUDA.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # Before setuptools 70.1.
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
MIM_FILES = ("configs", "demo", "tools", "model-index.yml")
WITH_EXT = os.environ.get("MMVMAMBA_WITH_EXT", "0")


def build_kernels(folder: Path) -> None:
    """Compiles the libraries that were asked for into a folder.

    Raises:
        SystemExit: If that cannot be done; the message says what to do.
    """
    if WITH_EXT not in ("1", "cpu"):
        raise SystemExit(f"MMVMAMBA_WITH_EXT must be 0, 1 or cpu, got {WITH_EXT!r}")
    folder.mkdir(parents=True, exist_ok=True)
    # First, since what it lacks most often, nvcc, is known at once.
    if WITH_EXT == "1":
        _build_cuda(folder)
    compiler = _load_compiler()
    try:
        compiler.compile_library(folder)
    except compiler.BuildError as error:
        raise SystemExit(f"cannot build the compiled kernels: {error}") from error


def _load_compiler() -> ModuleType:
    """The module alone: its package imports PyTorch."""
    path = ROOT / "kernels/mmvmamba_kernels/backends/native/compiler.py"
    spec = importlib.util.spec_from_file_location("mmvmamba_compiler", path)
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for it.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _build_cuda(folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "kernels"))
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"MMVMAMBA_WITH_EXT=1 needs PyTorch to build ({error}): install it first and call pip "
            "with --no-build-isolation, or set MMVMAMBA_WITH_EXT=cpu, which needs none"
        ) from error
    if torch.version.cuda is None:
        return
    from mmvmamba_kernels.backends.native import build

    try:
        build.build_cuda(destination=folder)
    except build.BuildError as error:
        raise SystemExit(
            f"cannot build the CUDA kernels: {error} MMVMAMBA_WITH_EXT=cpu builds those for the "
            "CPU alone."
        ) from error


class KernelDistribution(Distribution):
    """Says that the wheel is for one platform if it has compiled kernels."""

    def has_ext_modules(self):
        return WITH_EXT != "0"


class KernelWheel(bdist_wheel):
    """Names the platform in the wheel, and no Python: the libraries know nothing of it."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if WITH_EXT == "0" else ("py3", "none", platform)


class BuildPyWithMim(build_py):
    """Puts `MIM_FILES` at `mmvmamba/.mim`, and builds the kernels.

    A wheel gets copies. An editable install gets links beside the sources, so that an edited config
    is the one that `mmvmamba::` finds.
    """

    def run(self):
        super().run()
        if WITH_EXT != "0":
            base = ROOT / "kernels" if self.editable_mode else Path(self.build_lib)
            build_kernels(base / "mmvmamba_kernels/backends/native/lib")
        if self.editable_mode:
            mim = ROOT / "mmvmamba" / ".mim"
            mim.mkdir(exist_ok=True)
            for name in MIM_FILES:
                link = mim / name
                if link.is_symlink() or link.is_file():
                    link.unlink()
                elif link.is_dir():
                    shutil.rmtree(link)
                link.symlink_to(os.path.relpath(ROOT / name, mim))
            return
        mim = Path(self.build_lib) / "mmvmamba" / ".mim"
        # A leftover of an earlier build would otherwise carry deleted configs into the wheel.
        shutil.rmtree(mim, ignore_errors=True)
        for name in MIM_FILES:
            source, target = ROOT / name, mim / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)


class EditableWheelForMim(editable_wheel):
    """Lets openmim find the `.mim` folder of an editable install.

    openmim looks for a package beside its metadata, in site-packages, where an editable install has
    none, and then for what the first line of `top_level.txt` says, as a path below site-packages or
    an absolute one.
    """

    def run(self):
        if not self.dist_info_dir:
            Path(self.dist_dir).mkdir(exist_ok=True)
            metadata = self.reinitialize_command("dist_info")
            metadata.output_dir = self.dist_dir
            metadata.ensure_finalized()
            metadata.run()
            self.dist_info_dir = metadata.dist_info_dir
        names = Path(self.dist_info_dir, "top_level.txt")
        names.write_text(f"{ROOT / 'mmvmamba'}\n{names.read_text()}")
        super().run()


setup(
    cmdclass={
        "bdist_wheel": KernelWheel,
        "build_py": BuildPyWithMim,
        "editable_wheel": EditableWheelForMim,
    },
    distclass=KernelDistribution,
)
