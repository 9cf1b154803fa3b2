"""Build the compiled library: ``python -m mmvmamba_kernels.build``.

Needs a C++17 compiler (GCC 9 or Clang 10 and later) and the headers that come with PyTorch, no GPU
and no other package. The library goes into the package, or into the user's cache where the
package's folder cannot be written.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from mmvmamba_kernels import extension

logger = logging.getLogger(__name__)

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",
)
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")


class BuildError(RuntimeError):
    """The library cannot be built; the message says what is missing or what the compiler said."""


@dataclass(frozen=True)
class _Unit:
    """One run of the compiler."""

    name: str
    source: str
    flags: tuple[str, ...]


def _units() -> list[_Unit]:
    """What to compile, longest first."""
    torch_flags = (
        f"-I{Path(torch.__file__).parent / 'include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-fopenmp",
    )
    instruction_sets = {"baseline": ()}
    if platform.machine() in ("x86_64", "AMD64"):
        instruction_sets |= {"avx2": _AVX2, "avx512": _AVX512}
    kernels = [
        _Unit(
            f"kernels, {name}",
            "cpu/scan_kernels.cpp",
            (f"-DMMVMAMBA_ISA={name}", f"-DMMVMAMBA_KERNELS=kKernels{name.title()}", *flags),
        )
        for name, flags in instruction_sets.items()
    ]
    return [_Unit("operators", "cpu/scan_ops.cpp", torch_flags), *kernels]


def find_compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX``, or the first of c++, g++ and clang++ on the path.

    Raises:
        BuildError: If there is none.
    """
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    missing = f"CXX={shlex.join(asked)} was not found" if asked else "found no C++ compiler"
    raise BuildError(
        f"{missing}. Install one (Debian and Ubuntu: apt install g++) or set CXX to its path. "
        "Without the library everything still runs on the CPU, only slower."
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(
            f"the compiler failed with exit status {done.returncode}.\n{shlex.join(command)}\n"
            f"{done.stderr[-4000:]}"
        )


def _link_flags() -> list[str]:
    libraries = Path(torch.__file__).parent / "lib"
    # PyTorch's own OpenMP runtime under its own name: a second one would have threads of its own.
    runtimes = [path.name for path in sorted(libraries.glob("libgomp*.so*"))]
    openmp = ["-Wl,--as-needed", f"-l:{runtimes[0]}"] if runtimes else []
    return [f"-L{libraries}", *openmp, "-fopenmp", "-lc10", "-ltorch_cpu"]


def _destination() -> Path:
    """The first folder of the search path that can be written.

    Raises:
        BuildError: If there is none.
    """
    for folder in extension.search_path():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            logger.info("cannot write to %s: %s", folder, error)
    raise BuildError(
        "no folder for the library can be written: "
        + ", ".join(map(str, extension.search_path()))
        + ". Set XDG_CACHE_HOME to one that can."
    )


def build(force: bool = False) -> Path:
    """Compile the library unless it is there.

    Args:
        force: Compile in any case.

    Returns:
        The library's path.

    Raises:
        BuildError: If there is no compiler, it fails, or there is nowhere to write to.
    """
    present = extension.find_library()
    if present is not None and not force:
        logger.info("already built: %s", present)
        return present
    compiler = find_compiler()
    destination = _destination()
    start = time.perf_counter()
    units = _units()
    with tempfile.TemporaryDirectory(dir=destination) as temporary:

        def compile_unit(unit: _Unit) -> str:
            target = str(Path(temporary) / f"{units.index(unit)}.o")
            source = str(extension.SOURCES / unit.source)
            _run([*compiler, *_FLAGS, *unit.flags, "-c", source, "-o", target])
            logger.info("compiled %s (%.0f s)", unit.name, time.perf_counter() - start)
            return target

        logger.info("compiling %d files with %s", len(units), shlex.join(compiler))
        with ThreadPoolExecutor(min(len(units), os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_unit, units))
        linked = Path(temporary) / "library.so"
        _run([*compiler, "-shared", *objects, *_link_flags(), "-o", str(linked)])
        # In one step, so that nobody loads half a file.
        library = destination / extension.library_name()
        linked.replace(library)
    logger.info("built %s (%.0f s)", library, time.perf_counter() - start)
    return library


def main() -> int:
    """The command line.

    Returns:
        The exit status: 0, or 1 if the library cannot be built or loaded.
    """
    parser = argparse.ArgumentParser(
        prog=extension.BUILD_COMMAND, description="Compile the C++ kernels of mmvmamba."
    )
    parser.add_argument("--force", action="store_true", help="compile even if it is built")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        build(arguments.force)
    except BuildError as error:
        logger.error("cannot build the C++ kernels: %s", error)  # noqa: TRY400
        return 1
    reason = extension.load()
    if reason is not None:
        logger.error("built, but %s", reason)
        return 1
    logger.info("loaded: the 'cpp' backend is available")
    return 0


if __name__ == "__main__":
    sys.exit(main())
