"""Whether Triton kernels can run a call, found out without importing Triton."""

from __future__ import annotations

import importlib.util
import os

from mmvmamba_kernels.dispatch import Problem

DEVICES = ("cuda", "xpu")
MAX_STATES = 64


def interpreting() -> bool:
    """Whether Triton was asked to run kernels in Python, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_run(problem: Problem) -> str | None:
    """None if the Triton kernels can run the problem, else the reason why not."""
    if problem.device.type not in DEVICES and not interpreting():
        return (
            f"Triton needs a tensor on {' or '.join(DEVICES)}, this one is on "
            f"{problem.device.type!r} (or, for tests, TRITON_INTERPRET=1 set before Python starts)"
        )
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; PyTorch's GPU builds bring it, or: pip install triton"
    if problem.states > MAX_STATES:
        return (
            f"Triton kernels hold at most {MAX_STATES} states per channel, A has {problem.states}"
        )
    return None
