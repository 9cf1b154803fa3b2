"""Whether Triton kernels can run a call, found out without importing Triton, and where."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mmvmamba_kernels import rehearsal
from mmvmamba_kernels.dispatch import Problem

DEVICES = ("cuda", "xpu")
MAX_STATES = 64

# Compared once: a comparison parses both versions, and every operator asks twice a call.
TORCH_IS_OLD = torch.__version__ < (2, 9)


def interpreting() -> bool:
    """Whether Triton was asked to run kernels in Python, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _c_compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def can_run(problem: Problem) -> str | None:
    """None if the Triton kernels can run the problem, else the reason why not."""
    if problem.device.type not in DEVICES and not interpreting():
        return (
            f"Triton needs a tensor on {' or '.join(DEVICES)}, this one is on "
            f"{problem.device.type!r} (or, for tests, TRITON_INTERPRET=1 set before Python starts)"
        )
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; PyTorch's GPU builds bring it, or: pip install triton"
    if TORCH_IS_OLD:
        return "the kernels need Triton 3.5, which comes with PyTorch 2.9"
    if problem.device.type in DEVICES and not interpreting() and not _c_compiler():
        return "Triton builds its launchers with a C compiler: install gcc, or set CC"
    if problem.states > MAX_STATES:
        return (
            f"Triton kernels hold at most {MAX_STATES} states per channel, A has {problem.states}"
        )
    return None


def compile_hook() -> tuple[object, str]:
    """Where Triton looks for what it calls before it compiles: an object and its attribute."""
    import triton

    # Until Triton 3.4 it is an attribute of all functions.
    knobs = getattr(triton, "knobs", None)
    return (
        (triton.JITFunction, "cache_hook") if knobs is None else (knobs.runtime, "jit_cache_hook")
    )


@functools.cache
def _refuse_to_compile_in_capture() -> None:
    """Let kernels of this package that a CUDA graph's capture would compile be refused.

    To compile takes seconds, and loads code, which a capture forbids with a message that says
    nothing of kernels.
    """
    owner, name = compile_hook()
    before = getattr(owner, name)

    def hook(*args, **details):
        if details["fn"].module.startswith("mmvmamba_kernels.") and (
            torch.cuda.is_current_stream_capturing()
        ):
            raise RuntimeError(
                f"{details['fn'].name} is not compiled yet for these arguments, and a CUDA graph "
                "is being captured: run the model once before the capture, on the same device, "
                "with inputs of the same shapes and dtypes, and with gradients if it has them"
            )
        return before(*args, **details) if before else False

    setattr(owner, name, hook)


def lanes(device: torch.device) -> int:
    """Lanes of a warp: 64 on AMD's data-centre GPUs, else 32."""
    if device.type != "cuda" or torch.version.hip is None:
        return 32
    return torch.cuda.get_device_properties(device).warp_size


def on_device(tensor: Tensor) -> AbstractContextManager:
    """A context in which kernels are launched on the tensor's device."""
    if tensor.device.type in DEVICES and not rehearsal.active():
        if tensor.is_cuda:
            _refuse_to_compile_in_capture()
        return torch.get_device_module(tensor.device).device(tensor.device)
    return nullcontext()


def is_aligned(tensor: Tensor, size: int) -> bool:
    """Whether a tensor starts at a multiple of so many bytes; new ones do."""
    return rehearsal.active() or tensor.data_ptr() % size == 0


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; one in the interpreter."""
    if interpreting():
        return 1
    if rehearsal.active():
        return rehearsal.PROCESSORS
    index = device.index
    if index is None:
        index = torch.get_device_module(device).current_device()
    return _multiprocessors(index)


@functools.cache
def _multiprocessors(index: int) -> int:
    # Only launchers of kernels ask, which have imported it.
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(index)["multiprocessor_count"]
