"""Finding and loading the compiled libraries. :mod:`.build` makes them."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

from mmvmamba_kernels.backends.native import compiler
from mmvmamba_kernels.dispatch import Problem

BUILD_COMMAND = "python -m mmvmamba_kernels.build"
MAX_STATES = 64

DEVICES = ("cpu", "cuda")
"""Kinds of device that have a library of their own."""

# By device. Those for GPUs register operators with PyTorch; the CPU's is called through ctypes.
_loaded: dict[str, tuple[Path, ctypes.CDLL]] = {}


def library_name(device: str = "cpu", architectures: tuple[int, ...] = ()) -> str:
    """File name of a library for these sources and this kind of machine.

    A library built for anything else has another name, so that it is never loaded. Those for GPUs
    use PyTorch's C++ interface, which changes with its version.

    Args:
        device: Which library, of those of :data:`DEVICES`, or :data:`compiler.ONNX_RUNTIME`.
        architectures: The GPUs that it is compiled for, ten times their compute capability.
    """
    if device != "cuda":
        return compiler.compiled_name(device)
    versions = (torch.__version__, str(torch.version.cuda))
    name = Path(compiler.library_name(device, ["cuda"], versions))
    return name.stem + "".join(f"-sm{a}" for a in architectures) + name.suffix


def compiled_architectures(library: Path) -> tuple[int, ...]:
    """The GPUs that a library has machine code for, as its name says."""
    return tuple(int(part[2:]) for part in library.stem.split("-")[2:])


def search_path() -> tuple[Path, Path]:
    """Folders that may hold a library: inside the package, then the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(__file__).parent / "lib", Path(cache) / "mmvmamba_kernels"


def find_libraries(device: str = "cpu") -> list[Path]:
    """The libraries for these sources and this PyTorch, in the order in which they are tried.

    Of those for GPUs the ones that run on the GPUs of this machine come first, above all those
    compiled for just these: one in the package, which not everyone can replace, hides none.
    """
    stem = Path(library_name(device)).stem
    found = [
        library
        for folder in search_path()
        for library in sorted((*folder.glob(f"{stem}.so"), *folder.glob(f"{stem}-*.so")))
    ]
    gpus = range(torch.cuda.device_count()) if device == "cuda" and len(found) > 1 else ()
    capabilities = [torch.cuda.get_device_capability(gpu) for gpu in gpus]

    def misfits(library: Path) -> tuple[int, int]:
        compiled = compiled_architectures(library)
        unfit = sum(not architectures_fit(compiled, capability) for capability in capabilities)
        return unfit, sum(10 * major + minor not in compiled for major, minor in capabilities)

    return sorted(found, key=misfits)


def find_library(device: str = "cpu") -> Path | None:
    """The library that is loaded, else the one that :func:`load` would try first, if there is one.

    Args:
        device: Which library, of those of :data:`DEVICES`.
    """
    found = find_libraries(device)
    loaded, _ = _loaded.get(device, (None, None))
    return loaded if loaded in found else next(iter(found), None)


def build_command(device: str = "cpu") -> str:
    """What a user runs to build a library."""
    return BUILD_COMMAND if device == "cpu" else f"{BUILD_COMMAND} --{device}"


@functools.cache
def load(device: str = "cpu") -> str | None:
    """Load a library, once.

    Returns:
        None if its operators can be called, else the reason why not.
    """
    command = build_command(device)
    name = "compiled library" if device == "cpu" else f"compiled {device.upper()} library"
    failures = []
    for path in find_libraries(device):
        try:
            _loaded[device] = path, _open(path, device)
        except OSError as error:
            # Such as one for a later C library, from a folder that several machines share.
            failures.append(str(error))
        else:
            return None
    if failures:
        return f"the {name} does not load ({'; '.join(failures)}); run: {command}"
    prefix = library_name(device).split("-")[0]
    others = any(any(folder.glob(f"{prefix}-*.so")) for folder in search_path())
    state = "is not built"
    if others:
        state = "was built from other sources or for another kind of machine"
        if device == "cuda":
            state += f", or for another PyTorch than {torch.__version__}"
    return f"the {name} {state}; run: {command}"


def _open(path: Path, device: str) -> ctypes.CDLL:
    if device != "cpu":
        torch.ops.load_library(path)
        return ctypes.CDLL(path)
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        if "GOMP" not in str(error):
            raise
        # PyTorch did not make its OpenMP runtime known to other libraries: a build of one's own.
        ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(path)


def library() -> ctypes.CDLL:
    """The CPU's library, which :func:`load` has loaded."""
    return _loaded["cpu"][1]


def architectures_fit(architectures: tuple[int, ...], capability: tuple[int, int]) -> bool:
    """Whether a library for these architectures runs on a GPU of this compute capability.

    Machine code runs on later GPUs of one generation; the driver translates what there is of the
    latest architecture for those that are later still.
    """
    gpu = 10 * capability[0] + capability[1]
    same = any(a // 10 == capability[0] and a <= gpu for a in architectures)
    return same or gpu >= max(architectures)


@functools.cache
def _no_kernels_for(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    library = find_library("cuda")
    architectures = compiled_architectures(library) if library else ()
    if not architectures or architectures_fit(architectures, capability):
        return None
    compiled = ", ".join(f"{a // 10}.{a % 10}" for a in architectures)
    return (
        f"the compiled CUDA library is for GPUs of compute capability {compiled}, this one has "
        f"{capability[0]}.{capability[1]}; run: {build_command('cuda')}"
    )


def can_run(problem: Problem) -> str | None:
    """None if the C++ kernels can run the problem, else the reason why not."""
    device = problem.device.type
    if device not in DEVICES:
        return f"the C++ kernels run on the CPU and on NVIDIA GPUs, this tensor is on {device!r}"
    if problem.states > MAX_STATES:
        return (
            f"the C++ kernels hold at most {MAX_STATES} states per channel, A has {problem.states}"
        )
    if device == "cuda" and problem.listed:
        return (
            "the CUDA kernels compute positions along a path, and have no code for paths that are "
            "lists of positions; the Triton kernels do"
        )
    if device == "cuda" and torch.version.cuda is None:
        return "the CUDA kernels need a PyTorch that is built for CUDA"
    reason = load(device)
    if reason is None and device == "cuda":
        reason = _no_kernels_for(problem.device)
    return reason
