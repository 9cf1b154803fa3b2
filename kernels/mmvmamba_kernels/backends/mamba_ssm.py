"""Whether the package mamba-ssm can run a call, found out without importing it."""

from __future__ import annotations

import importlib.util

import torch

from mmvmamba_kernels.dispatch import Problem

MAX_STATES = 256
STAND_IN = "mmvmamba_kernels.stand_in"
"""Origin, in their specifications, of modules that this package puts in the place of others."""


def can_run(problem: Problem) -> str | None:
    """None if mamba-ssm's selective scan can run the problem, else the reason why not."""
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None or spec.origin == STAND_IN:
        return "the package mamba-ssm is not installed; the other backends need no such package"
    if problem.device.type != "cuda":
        return f"mamba-ssm needs a CUDA tensor, this one is on {problem.device.type!r}"
    if problem.dtype == torch.float64:
        return "mamba-ssm computes in float32 and does not take float64"
    if problem.states > MAX_STATES:
        return f"mamba-ssm holds at most {MAX_STATES} states per channel, A has {problem.states}"
    if torch.are_deterministic_algorithms_enabled():
        return (
            "mamba-ssm's backward pass adds with atomics, so it is not deterministic, and "
            "torch.use_deterministic_algorithms is on"
        )
    return None
