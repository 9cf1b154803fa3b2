"""Fixtures of the kernel tests."""

import pytest
import torch


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
