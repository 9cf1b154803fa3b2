"""The tests of the Triton kernels, where there is no GPU: through Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmvmamba_kernels.backends.triton.support import interpreting

FILES = [
    "test_acceptance.py",
    "test_triton.py",
    "test_depthwise_conv.py",
    "test_layer_norm.py",
    "test_selective_scan_2d_norm.py",
]


@pytest.mark.skipif(torch.cuda.is_available() or interpreting(), reason="the tests run directly")
@pytest.mark.parametrize(
    "chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=str
)
def test_kernels_through_the_interpreter(chosen):
    """All in one process.

    The interpreter is chosen by an environment variable that must be set before Triton is imported,
    which torch does at will.
    """
    pytest.importorskip("triton", "3.5", "there is no Triton 3.5 or later")
    folder = Path(__file__).parent
    marked = {path.name for path in folder.glob("test_*.py") if "mark.triton" in path.read_text()}
    assert marked - {Path(__file__).name} == set(FILES)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", f"triton and {chosen}", *FILES],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout
