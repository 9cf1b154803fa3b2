"""The CUDA kernels compile for real GPUs, on a machine that may have none, and fit registers."""

import logging
import re
import subprocess

import pytest
from architectures import on_architectures

from mmvmamba_kernels.backends.native import build, compiler

logger = logging.getLogger(__name__)

KERNELS = ("scan_forward", "scan_adjoint_ends", "scan_carry", "scan_backward")

# Bytes that a thread may keep in memory although it has no array of states: some loop counters.
SPILL = 96


@pytest.fixture(scope="module")
def nvcc():
    try:
        return build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))


def resources(report):
    """Kernel, registers, and bytes spilled, of everything that the assembler reports."""
    found = re.findall(
        r"entry function '_ZN8mmvmamba4cuda\d+([a-z_]+)_kernel(\w+)' for.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    return [(kernel, int(registers), int(spill)) for kernel, _, spill, _, registers in found]


@on_architectures("dtype", ["kHalf", "kBFloat16", "kFloat", "kDouble"])
def test_every_kernel_compiles(architecture, dtype, nvcc, tmp_path):
    if architecture not in build.known_architectures(nvcc):
        pytest.skip(f"{nvcc} does not know sm_{architecture}")
    source = compiler.SOURCES / "cuda" / "scan_kernels.cu"
    flags = [
        *build.kernel_flags(dtype, ()),
        f"-arch=sm_{architecture}",
        "-Xptxas=-v",
        build.STANDARD,
    ]
    done = subprocess.run(
        [nvcc, *flags, "-cubin", str(source), "-o", str(tmp_path / "kernels.cubin")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    found = resources(done.stderr)
    for kernel, registers, spill in found:
        logger.info(
            "sm_%d %s %s: %d registers, %d spilled", architecture, dtype, kernel, registers, spill
        )
        # Twice the numbers for states of twice the size.
        double = 2 if dtype == "kDouble" else 1
        assert registers <= min(128 * double, 255)
        assert spill <= SPILL * double
    assert {kernel for kernel, *_ in found} == set(KERNELS)
    # One and several states; forwards and backwards.
    assert len(found) == 2 * len(KERNELS)
