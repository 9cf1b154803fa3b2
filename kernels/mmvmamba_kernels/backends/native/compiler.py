"""Compiling what needs a C++ compiler alone: `setup.py` runs this module without PyTorch."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"

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
    """A library cannot be built; the message says what is missing or what the compiler said."""


@dataclass(frozen=True)
class Unit:
    """One run of the compiler."""

    name: str
    source: str
    flags: tuple[str, ...]


ONNX_RUNTIME = "onnxruntime"
"""The library of ONNX Runtime's operators."""

# By library: the folders of its sources, and what is compiled beside the CPU's kernels.
_LIBRARIES = {
    "cpu": (["cpu"], Unit("tasks", "cpu/scan_library.cpp", ("-fopenmp",))),
    ONNX_RUNTIME: (["cpu", "onnxruntime"], Unit("operator", "onnxruntime/scan_op.cpp", ())),
}


def library_name(kind: str, folders: Iterable[str], parts: Iterable[str] = ()) -> str:
    """File name of a library for these sources and this kind of machine.

    Args:
        kind: Which library; the CPU's has no kind in its name.
        folders: Folders of `SOURCES` that it is made of, beside what all libraries share.
        parts: What else it depends on.
    """
    digest = hashlib.sha256(" ".join([*parts, platform.system(), platform.machine()]).encode())
    shared = [path for path in SOURCES.iterdir() if path.is_file()]
    own = [path for folder in folders for path in (SOURCES / folder).rglob("*") if path.is_file()]
    for path in sorted(shared + own):
        digest.update(path.name.encode() + path.read_bytes())
    return f"libmmvmamba_kernels{'' if kind == 'cpu' else '_' + kind}-{digest.hexdigest()[:16]}.so"


def compiled_name(kind: str = "cpu") -> str:
    """File name of a library that :func:`compile_library` makes."""
    return library_name(kind, _LIBRARIES[kind][0])


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


def run(command: list[str]) -> str:
    """Run a compiler.

    Returns:
        What it wrote.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(
            f"the compiler failed with exit status {done.returncode}.\n{shlex.join(command)}\n"
            f"{done.stderr[-4000:]}"
        )
    return done.stdout + done.stderr


def make(
    units: list[Unit], compiler: list[str], link_flags: list[str], name: str, destination: Path
) -> Path:
    """Compile all units at once and link them.

    Returns:
        The library's path.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=destination) as temporary:

        def compile_unit(unit: Unit) -> str:
            target = str(Path(temporary) / f"{units.index(unit)}.o")
            source = str(SOURCES / unit.source)
            run([*compiler, *unit.flags, "-c", source, "-o", target])
            logger.info("compiled %s (%.0f s)", unit.name, time.perf_counter() - start)
            return target

        logger.info("compiling %d files with %s", len(units), shlex.join(compiler))
        with ThreadPoolExecutor(min(len(units), os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_unit, units))
        linked = Path(temporary) / "library.so"
        run([*compiler, "-shared", *objects, *link_flags, "-o", str(linked)])
        # In one step, so that nobody loads half a file.
        library = destination / name
        linked.replace(library)
    logger.info("built %s (%.0f s)", library, time.perf_counter() - start)
    return library


def _units(kind: str) -> list[Unit]:
    """What to compile for a library."""
    instruction_sets = {"baseline": ()}
    if platform.machine() in ("x86_64", "AMD64"):
        instruction_sets |= {"avx2": _AVX2, "avx512": _AVX512}
    kernels = [
        Unit(
            f"kernels, {name}",
            "cpu/scan_kernels.cpp",
            (f"-DMMVMAMBA_ISA={name}", f"-DMMVMAMBA_KERNELS=kKernels{name.title()}", *flags),
        )
        for name, flags in reversed(instruction_sets.items())
    ]
    return [*kernels, _LIBRARIES[kind][1]]


def compile_library(destination: Path, kind: str = "cpu") -> Path:
    """Compile the library for the CPU, or that of ONNX Runtime's operators.

    The former is linked to no OpenMP runtime: PyTorch's own, which every process with PyTorch has
    loaded, serves it. A second one would have threads of its own.

    Args:
        destination: Folder for the library.
        kind: 'cpu' or `ONNX_RUNTIME`.

    Returns:
        The library's path.

    Raises:
        BuildError: If there is no compiler, or it fails.
    """
    return make(_units(kind), [*find_compiler(), *_FLAGS], [], compiled_name(kind), destination)
