"""Build the compiled libraries; ``python -m mmvmamba_kernels.build`` is the command.

The library for the CPU needs a compiler for C++17 (GCC 9 or Clang 10 and later), with PyTorch 2.14
and later for C++20 (GCC 11, Clang 14), and the headers that come with PyTorch, no GPU and no other
package. With ``--cuda`` the one for NVIDIA GPUs is built as well, which needs nvcc of the CUDA
version that PyTorch was built with, and no GPU either. With ``--onnxruntime`` the scan is built as
an operator of ONNX Runtime, which needs neither PyTorch nor headers of anyone. Libraries go into
the package, or into the user's cache where the package's folder cannot be written.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from mmvmamba_kernels.backends.native import extension

logger = logging.getLogger(__name__)

# What torch's headers are written in.
STANDARD = "-std=c++20" if torch.__version__ >= (2, 14) else "-std=c++17"
_FLAGS = (
    STANDARD,
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

_CUDA_FLAGS = (STANDARD, "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")
# Results below 1e-38 are taken for zero, which saves four instructions at every exponential.
_KERNEL_FLAGS = ("-ftz=true",)
# Of maps: the kernels' source is compiled for each.
_MAP_DTYPES = ("kBFloat16", "kHalf", "kFloat", "kDouble")

DEFAULT_ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
"""What is compiled for where no GPU says otherwise and nvcc knows it, ten times compute capability.

Code for 8.0 runs on 8.6 and 8.9 as well, but not as well as their own.
"""


class BuildError(RuntimeError):
    """A library cannot be built; the message says what is missing or what the compiler said."""


@dataclass(frozen=True)
class _Unit:
    """One run of the compiler."""

    name: str
    source: str
    flags: tuple[str, ...]


def _torch_flags() -> tuple[str, ...]:
    return (
        f"-I{Path(torch.__file__).parent / 'include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    )


def _kernel_units() -> list[_Unit]:
    """The CPU's kernels, for every instruction set."""
    instruction_sets = {"baseline": ()}
    if platform.machine() in ("x86_64", "AMD64"):
        instruction_sets |= {"avx2": _AVX2, "avx512": _AVX512}
    return [
        _Unit(
            f"kernels, {name}",
            "cpu/scan_kernels.cpp",
            (f"-DMMVMAMBA_ISA={name}", f"-DMMVMAMBA_KERNELS=kKernels{name.title()}", *flags),
        )
        for name, flags in instruction_sets.items()
    ]


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


def _run(command: list[str]) -> str:
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


def _make(
    units: list[_Unit], compiler: list[str], link_flags: list[str], name: str, destination: Path
) -> Path:
    """Compile all units at once and link them.

    Returns:
        The library's path.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=destination) as temporary:

        def compile_unit(unit: _Unit) -> str:
            target = str(Path(temporary) / f"{units.index(unit)}.o")
            source = str(extension.SOURCES / unit.source)
            _run([*compiler, *unit.flags, "-c", source, "-o", target])
            logger.info("compiled %s (%.0f s)", unit.name, time.perf_counter() - start)
            return target

        logger.info("compiling %d files with %s", len(units), shlex.join(compiler))
        with ThreadPoolExecutor(min(len(units), os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_unit, units))
        linked = Path(temporary) / "library.so"
        _run([*compiler, "-shared", *objects, *link_flags, "-o", str(linked)])
        # In one step, so that nobody loads half a file.
        library = destination / name
        linked.replace(library)
    logger.info("built %s (%.0f s)", library, time.perf_counter() - start)
    return library


def build(force: bool = False, destination: Path | None = None) -> Path:
    """Compile the library for the CPU unless it is there.

    Args:
        force: Compile in any case.
        destination: Folder for the library; None for the package's, or else the user's cache.

    Returns:
        The library's path.

    Raises:
        BuildError: If there is no compiler, it fails, or there is nowhere to write to.
    """
    if destination is None and not force:
        present = extension.find_library()
        # One that does not load, in a folder that cannot be written, is no reason to build none.
        if present is not None and extension.load() is None:
            logger.info("already built: %s", present)
            return present
        extension.load.cache_clear()
    compiler = [*find_compiler(), *_FLAGS]
    name = extension.library_name()
    # The longest first.
    operators = _Unit("operators", "cpu/scan_ops.cpp", (*_torch_flags(), "-fopenmp"))
    units = [operators, *_kernel_units()]
    return _make(units, compiler, _link_flags(), name, destination or _destination())


def build_onnxruntime(force: bool = False) -> Path:
    """Compile ONNX Runtime's operators unless they are there; neither it nor PyTorch is needed.

    Args:
        force: Compile in any case.

    Returns:
        The library's path, for ``SessionOptions.register_custom_ops_library``.

    Raises:
        BuildError: If there is no compiler, it fails, or there is nowhere to write to.
    """
    present = extension.find_library(extension.ONNX_RUNTIME)
    if present is not None and not force:
        logger.info("already built: %s", present)
        return present
    units = [_Unit("operators", "onnxruntime/scan_op.cpp", ()), *_kernel_units()]
    name = extension.library_name(extension.ONNX_RUNTIME)
    return _make(units, [*find_compiler(), *_FLAGS], [], name, _destination())


def _package_folders() -> Iterable[Path]:
    """Folders of NVIDIA's Python packages, which have headers and may have a compiler."""
    return sorted(Path(sysconfig.get_path("platlib"), "nvidia").glob("*"))


def find_nvcc() -> str:
    """CUDA's compiler: of ``$CUDA_HOME``, on the path, or where it is usually installed.

    Raises:
        BuildError: If there is none, or it is of another major version than PyTorch's CUDA.
    """
    wanted = torch.version.cuda
    if wanted is None:
        raise BuildError(
            f"the CUDA kernels need a PyTorch that is built for CUDA, this is {torch.__version__}"
        )
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home)] if home else [Path("/usr/local/cuda"), *_package_folders()]
    candidates = [str(place / "bin" / "nvcc") for place in places]
    if not home:
        candidates.insert(0, "nvcc")
    nvcc = next((path for path in map(shutil.which, candidates) if path), None)
    advice = (
        f"Install the CUDA toolkit {wanted.split('.')[0]} and set CUDA_HOME to its folder, or use "
        "the 'triton' backend, which needs no toolkit."
    )
    if nvcc is None:
        looked = f"no bin/nvcc in CUDA_HOME={home}" if home else "found no nvcc"
        raise BuildError(f"{looked}. {advice}")
    release = re.search(r"release (\d+)\.(\d+)", _run([nvcc, "--version"]))
    if release is None or release[1] != wanted.split(".")[0]:
        found = f"of CUDA {release[1]}.{release[2]}" if release else "of no version that it says"
        raise BuildError(f"{nvcc} is {found}, but PyTorch was built with CUDA {wanted}. {advice}")
    return nvcc


def parse_architectures(text: str) -> tuple[int, ...]:
    """Compute capabilities, as in ``TORCH_CUDA_ARCH_LIST``, times ten.

    Args:
        text: Such as '8.0;9.0' or '8.0 9.0a+PTX'. The latest architecture is always kept in a form
            that drivers translate for later GPUs, and nothing is used that only one GPU has, so
            that '+PTX' and a letter change nothing.

    Raises:
        BuildError: If it is no such list.
    """
    parts = [part for part in re.split(r"[;,\s]+", text) if part]
    matches = [re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", part) for part in parts]
    if not parts or None in matches:
        raise BuildError(f"{text!r} is no list of GPU architectures such as '8.0;9.0;12.0'")
    return tuple(sorted({int(m[1]) * 10 + int(m[2]) for m in matches}))


def known_architectures(nvcc: str) -> set[int]:
    """What a compiler can compile for, ten times compute capability."""
    return {int(a) for a in re.findall(r"compute_(\d+)", _run([nvcc, "--list-gpu-arch"]))}


def choose_architectures(nvcc: str, asked: str | None = None) -> tuple[int, ...]:
    """The GPUs to compile for, ten times their compute capability.

    Args:
        nvcc: CUDA's compiler.
        asked: A list as :func:`parse_architectures` takes it; None for
            ``$TORCH_CUDA_ARCH_LIST``, else the GPUs of this machine, else those of
            :data:`DEFAULT_ARCHITECTURES` that the compiler knows.

    Raises:
        BuildError: If the compiler does not know one.
    """
    known = known_architectures(nvcc)
    asked = asked or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        chosen = parse_architectures(asked)
    elif torch.cuda.is_available():
        capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        chosen = tuple(sorted({10 * major + minor for major, minor in capabilities}))
    else:
        return tuple(a for a in DEFAULT_ARCHITECTURES if a in known)
    unknown = [a for a in chosen if a not in known]
    if unknown:
        raise BuildError(
            f"{nvcc} cannot compile for compute capability "
            f"{', '.join(f'{a // 10}.{a % 10}' for a in unknown)}. It knows "
            f"{', '.join(f'{a // 10}.{a % 10}' for a in sorted(known))}."
        )
    return chosen


def kernel_flags(map_dtype: str, architectures: tuple[int, ...]) -> tuple[str, ...]:
    """What nvcc compiles the kernels for maps of one dtype with."""
    targets = [f"arch=compute_{a},code=sm_{a}" for a in architectures]
    # For later GPUs, in a form that their drivers translate.
    targets += [f"arch=compute_{a},code=compute_{a}" for a in architectures[-1:]]
    return (
        *_KERNEL_FLAGS,
        f"-DMMVMAMBA_MAP={map_dtype}",
        *(part for target in targets for part in ("-gencode", target)),
    )


def build_cuda(
    architectures: str | None = None, force: bool = False, destination: Path | None = None
) -> Path:
    """Compile the library for NVIDIA GPUs unless it is there.

    Args:
        architectures: What to compile for, see :func:`choose_architectures`.
        force: Compile in any case.
        destination: Folder for the library; None for the package's, or else the user's cache.

    Returns:
        The library's path.

    Raises:
        BuildError: If there is no fitting compiler, it does not know an architecture or fails, or
            there is nowhere to write to.
    """
    nvcc = find_nvcc()
    chosen = choose_architectures(nvcc, architectures)
    name = extension.library_name("cuda", chosen)
    present = extension.find_libraries("cuda") if destination is None and not force else []
    for library in present:
        if library.name == name:
            logger.info("already built: %s", library)
            return library
    host = ["-ccbin", find_compiler()[0]] if os.environ.get("CXX") else []
    # A compiler from a Python package comes without the headers, which are in another one.
    headers = [
        f"-isystem={folder / 'include'}"
        for folder in _package_folders()
        if (folder / "include" / "cuda_runtime_api.h").is_file()
    ]
    kernels = [
        _Unit(f"kernels, {dtype}", "cuda/scan_kernels.cu", kernel_flags(dtype, chosen))
        for dtype in _MAP_DTYPES
    ]
    units = [_Unit("operators", "cuda/scan_ops.cpp", ("-x", "c++", *_torch_flags())), *kernels]
    libraries = Path(torch.__file__).parent / "lib"
    link_flags = [f"-L{libraries}", "-lc10", "-lc10_cuda", "-ltorch_cpu"]
    compiler = [nvcc, *host, *_CUDA_FLAGS, *headers]
    library = _make(units, compiler, link_flags, name, destination or _destination())
    # Of libraries for other GPUs only one would be found.
    for other in library.parent.glob(f"{Path(extension.library_name('cuda')).stem}-*.so"):
        if other != library:
            other.unlink()
    return library


def main() -> int:
    """The command line.

    Returns:
        The exit status: 0, or 1 if a library cannot be built or loaded.
    """
    parser = argparse.ArgumentParser(
        prog=extension.BUILD_COMMAND, description="Compile the C++ kernels of mmvmamba."
    )
    parser.add_argument("--force", action="store_true", help="compile even if it is built")
    parser.add_argument("--cuda", action="store_true", help="also compile the CUDA kernels")
    parser.add_argument(
        "--arch",
        metavar="LIST",
        help="GPUs to compile them for, such as '8.0;9.0;12.0'; default: TORCH_CUDA_ARCH_LIST, "
        "else the GPUs of this machine, else all that nvcc knows of "
        + ", ".join(f"{a // 10}.{a % 10}" for a in DEFAULT_ARCHITECTURES),
    )
    parser.add_argument(
        "--onnxruntime",
        action="store_true",
        help="also compile the scan as an operator of ONNX Runtime",
    )
    arguments = parser.parse_args()
    if arguments.arch and not arguments.cuda:
        parser.error("--arch needs --cuda")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        build(arguments.force)
        if arguments.cuda:
            build_cuda(arguments.arch, arguments.force)
        if arguments.onnxruntime:
            build_onnxruntime(arguments.force)
    except BuildError as error:
        logger.error("cannot build the C++ kernels: %s", error)  # noqa: TRY400
        return 1
    for device in extension.DEVICES if arguments.cuda else ("cpu",):
        reason = extension.load(device)
        if reason is not None:
            logger.error("built, but %s", reason)
            return 1
    logger.info("loaded: the 'cpp' backend is available")
    return 0
