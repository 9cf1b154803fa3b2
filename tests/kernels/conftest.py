"""Fixtures of the kernel tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmvmamba_kernels


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory holds NaN, and operations without a deterministic algorithm raise."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def no_default_backend(monkeypatch):
    """Tests do not depend on the caller's environment."""
    monkeypatch.delenv("MMVMAMBA_KERNELS_BACKEND", raising=False)


@pytest.fixture
def interpreted_file(request):
    """The outcome of the test's own file in a process in which Triton interprets its kernels.

    The interpreter is chosen by an environment variable that must be set before Triton is imported,
    which torch does at will.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    folder = Path(mmvmamba_kernels.__file__).parent.parent
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }
    file = str(request.node.path)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
