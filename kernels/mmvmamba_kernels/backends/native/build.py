"""Build the compiled libraries; ``python -m mmvmamba_kernels.build`` is the command.

The library for the CPU needs a compiler for C++17 (GCC 9 or Clang 10 and later) and nothing else;
it serves every PyTorch. With ``--cuda`` the one for NVIDIA GPUs is built as well, for this PyTorch:
it needs nvcc of the CUDA version that PyTorch was built with, and no GPU. With ``--onnxruntime``
the scan is built as an operator of ONNX Runtime, which needs no more than the CPU's. Libraries go
into the package, or into the user's cache where the package's folder cannot be written.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from mmvmamba_kernels.backends.native import extension
from mmvmamba_kernels.backends.native.compiler import (
    ONNX_RUNTIME,
    BuildError,
    Unit,
    compile_library,
    find_compiler,
    make,
    run,
)

logger = logging.getLogger(__name__)

# What torch's headers are written in.
STANDARD = "-std=c++20" if torch.__version__ >= (2, 14) else "-std=c++17"
_CUDA_FLAGS = (STANDARD, "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")
# Results below 1e-38 are taken for zero, which saves four instructions at every exponential.
_KERNEL_FLAGS = ("-ftz=true",)
# Of maps: the kernels' source is compiled for each.
_MAP_DTYPES = ("kBFloat16", "kHalf", "kFloat", "kDouble")

DEFAULT_ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
"""What is compiled for where no GPU says otherwise and nvcc knows it, ten times compute capability.

Code for 8.0 runs on 8.6 and 8.9 as well, but not as well as their own.
"""


def _torch_flags() -> tuple[str, ...]:
    return (
        f"-I{Path(torch.__file__).parent / 'include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    )


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
        "the compiled library cannot be saved, none of these folders is writable: "
        + ", ".join(map(str, extension.search_path()))
        + ". Set XDG_CACHE_HOME to a writable folder."
    )


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
    return compile_library(destination or _destination())


def build_onnxruntime(force: bool = False) -> Path:
    """Compile ONNX Runtime's operators unless they are there; neither it nor PyTorch is needed.

    Args:
        force: Compile in any case.

    Returns:
        The library's path, for ``SessionOptions.register_custom_ops_library``.

    Raises:
        BuildError: If there is no compiler, it fails, or there is nowhere to write to.
    """
    present = extension.find_library(ONNX_RUNTIME)
    if present is not None and not force:
        logger.info("already built: %s", present)
        return present
    return compile_library(_destination(), ONNX_RUNTIME)


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
    release = re.search(r"release (\d+)\.(\d+)", run([nvcc, "--version"]))
    if release is None or release[1] != wanted.split(".")[0]:
        found = f"of CUDA {release[1]}.{release[2]}" if release else "of an unknown CUDA version"
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
        raise BuildError(f"{text!r} is not a list of compute capabilities such as '8.0;9.0;12.0'")
    return tuple(sorted({int(m[1]) * 10 + int(m[2]) for m in matches}))


def known_architectures(nvcc: str) -> set[int]:
    """What a compiler can compile for, ten times compute capability."""
    return {int(a) for a in re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"]))}


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
        Unit(f"kernels, {dtype}", "cuda/scan_kernels.cu", kernel_flags(dtype, chosen))
        for dtype in _MAP_DTYPES
    ]
    units = [Unit("operators", "cuda/scan_ops.cpp", ("-x", "c++", *_torch_flags())), *kernels]
    libraries = Path(torch.__file__).parent / "lib"
    link_flags = [f"-L{libraries}", "-lc10", "-lc10_cuda", "-ltorch_cpu"]
    compiler = [nvcc, *host, *_CUDA_FLAGS, *headers]
    library = make(units, compiler, link_flags, name, destination or _destination())
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
