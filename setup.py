"""Adds to the wheel what OpenMMLab's tools look for beside the code: configs, tools, the index.

Everything else stands in pyproject.toml. No import of torch happens here, so that an isolated build
needs setuptools alone.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM_FILES = ("configs", "tools", "model-index.yml")


class BuildPyWithMim(build_py):
    """Puts `configs`, `tools` and `model-index.yml` at `mmvmamba/.mim`.

    A wheel gets copies. An editable install gets links beside the sources, so that an edited config
    is the one that `mmvmamba::` finds.
    """

    def run(self):
        super().run()
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


setup(cmdclass={"build_py": BuildPyWithMim})
