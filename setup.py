"""Adds to the wheel what OpenMMLab's tools look for beside the code: configs, tools, the index.

Everything else stands in pyproject.toml. No import of torch happens here, so that an isolated build
needs setuptools alone, unless compiled kernels are asked for: MMVMAMBA_WITH_EXT=1 builds those for
the CPU and, if PyTorch was built for CUDA, those for NVIDIA GPUs; MMVMAMBA_WITH_EXT=cpu only the
former.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
MIM_FILES = ("configs", "tools", "model-index.yml")
WITH_EXT = os.environ.get("MMVMAMBA_WITH_EXT", "0")


def build_kernels(folder: Path) -> None:
    """Compiles the libraries that were asked for into a folder.

    Raises:
        SystemExit: If that cannot be done; the message says what to do.
    """
    if WITH_EXT not in ("1", "cpu"):
        raise SystemExit(f"MMVMAMBA_WITH_EXT must be 0, 1 or cpu, got {WITH_EXT!r}")
    sys.path.insert(0, str(ROOT / "kernels"))
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"MMVMAMBA_WITH_EXT={WITH_EXT} needs PyTorch to build ({error}): install it first "
            "and call pip with --no-build-isolation"
        ) from error
    from mmvmamba_kernels.backends.native import build

    folder.mkdir(parents=True, exist_ok=True)
    with_cuda = WITH_EXT == "1" and torch.version.cuda is not None
    try:
        # First, since what it lacks most often, nvcc, is known at once.
        if with_cuda:
            build.build_cuda(destination=folder)
        build.build(destination=folder)
    except build.BuildError as error:
        advice = " MMVMAMBA_WITH_EXT=cpu builds those for the CPU alone." if with_cuda else ""
        raise SystemExit(f"cannot build the compiled kernels: {error}{advice}") from error


class KernelDistribution(Distribution):
    """Says that the wheel is for one platform if it has compiled kernels."""

    def has_ext_modules(self):
        return WITH_EXT != "0"


class BuildPyWithMim(build_py):
    """Puts `configs`, `tools` and `model-index.yml` at `mmvmamba/.mim`, and builds the kernels.

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
    cmdclass={"build_py": BuildPyWithMim, "editable_wheel": EditableWheelForMim},
    distclass=KernelDistribution,
)
