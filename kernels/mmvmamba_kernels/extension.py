"""Finding and loading the compiled library. :mod:`mmvmamba_kernels.build` makes it."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from pathlib import Path

import torch

from mmvmamba_kernels.dispatch import Problem

BUILD_COMMAND = "python -m mmvmamba_kernels.build"
MAX_STATES = 64
SOURCES = Path(__file__).parent / "csrc"


def library_name() -> str:
    """File name of the library for these sources, this PyTorch and this kind of machine.

    A library built for anything else has another name, so that it is never loaded.
    """
    digest = hashlib.sha256(
        f"{torch.__version__} {platform.system()} {platform.machine()}".encode()
    )
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return f"libmmvmamba_kernels-{digest.hexdigest()[:16]}.so"


def search_path() -> tuple[Path, Path]:
    """Folders that may hold the library: inside the package, then the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(__file__).parent / "lib", Path(cache) / "mmvmamba_kernels"


def find_library() -> Path | None:
    """The library that :func:`load` would load, if it was built."""
    candidates = (folder / library_name() for folder in search_path())
    return next((path for path in candidates if path.is_file()), None)


@functools.cache
def load() -> str | None:
    """Load the library, once.

    Returns:
        None if its operators can be called, else the reason why not.
    """
    path = find_library()
    if path is None:
        others = any(any(folder.glob("*.so")) for folder in search_path() if folder.is_dir())
        state = (
            f"was built from other sources or for another PyTorch than {torch.__version__}"
            if others
            else "is not built"
        )
        return f"the compiled library {state}; run: {BUILD_COMMAND}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the compiled library does not load ({error}); run: {BUILD_COMMAND}"
    return None


def can_run(problem: Problem) -> str | None:
    """None if the C++ kernels can run the problem, else the reason why not."""
    if problem.device.type != "cpu":
        return f"the C++ kernels run on the CPU, this tensor is on {problem.device.type!r}"
    if problem.states > MAX_STATES:
        return (
            f"the C++ kernels hold at most {MAX_STATES} states per channel, A has {problem.states}"
        )
    return load()
