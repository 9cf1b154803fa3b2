"""The Triton kernels of a backbone, compiled in parallel before its first call on a GPU."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from mmvmamba.models.layers import autocast_dtype
from mmvmamba_kernels.dispatch import Problem, choose
from mmvmamba_kernels.registration import needs_dispatcher

if TYPE_CHECKING:
    from mmvmamba_kernels.backends.triton.precompile import Specialisation, Target

SHAPES = ((1, 512, 512), (512, 224, 224))
"""Batch, height and width of two inputs that together ask for every kernel of a mode.

With few programs the scan cuts its paths into chunks, which takes two kernels more, with many it
does not. Nothing else depends on the input's size, as long as maps have at least seven rows.
"""

TELL_EVERY = 5.0
"""Seconds between notices of how far compiling is."""


class Mode(NamedTuple):
    """What decides which kernels a backbone calls, beside its architecture.

    Attributes:
        dtype: Of weights and images.
        autocast: What autocast casts to; None where it is off.
        training: Whether gradients are computed.
    """

    dtype: torch.dtype
    autocast: torch.dtype | None
    training: bool


MODES = {
    "fp32": (torch.float32, None),
    "autocast-bf16": (torch.float32, torch.bfloat16),
    "autocast-fp16": (torch.float32, torch.float16),
    "bf16": (torch.bfloat16, None),
}
"""Dtype of weights and autocast's dtype by the names that the benchmarks use."""


def kernels_of(
    build: Callable[[], nn.Module],
    modes: Iterable[Mode],
    target: "Target",
    shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> "list[Specialisation]":
    """The kernels that a backbone calls.

    Args:
        build: Makes the backbone, `VMamba.of_one_block_a_stage` for instance.
        modes: How it is called.
        target: The GPU.
        shapes: Batch, height and width of the images.

    Raises:
        RuntimeError: As `check_fake_gpu`.
    """
    from mmvmamba_kernels.backends.triton.precompile import recording

    check_fake_gpu()
    with recording(target) as found, FakeTensorMode(), torch.device("cuda"):
        for mode in modes:
            model = build().train(mode.training)
            _convert(model, mode.dtype)
            for batch, height, width in shapes:
                images = torch.empty(batch, model.in_channels, height, width, dtype=mode.dtype)
                with torch.set_grad_enabled(mode.training), autocast_anywhere(mode.autocast):
                    model(images)
    return found


def check_fake_gpu() -> None:
    """Checks that this PyTorch computes with fake tensors of a GPU, be there one or not.

    Raises:
        RuntimeError: If it asks for a driver, as 2.7 does.
    """
    try:
        # What asks first, and by an exception: autograd would end the process.
        with FakeTensorMode():
            torch.zeros(1, 2, 2, 2, device="cuda").contiguous(memory_format=torch.channels_last)
    except RuntimeError as error:
        raise RuntimeError(
            f"PyTorch {torch.__version__} needs an NVIDIA driver to compute what a GPU would keep "
            f"or compile, and found none ({str(error).splitlines()[0]}). Use PyTorch 2.11 or "
            "later, or a machine with a GPU."
        ) from error


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """As `model.to(dtype)`, which fake parameters do not take."""
    for module in model.modules():
        kept = getattr(module, "kept_in_float32", ())
        for name, parameter in module.named_parameters(recurse=False):
            if name not in kept or dtype == torch.float64:
                setattr(module, name, nn.Parameter(parameter.detach().to(dtype)))


@contextmanager
def autocast_anywhere(dtype: torch.dtype | None, device: str = "cuda") -> Iterator[None]:
    """Autocast for a device that need not be there, where `torch.autocast` switches itself off.

    Args:
        dtype: What it casts to; None for no autocast.
        device: Type of the device.
    """
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, dtype is not None)
    if dtype is not None:
        torch.set_autocast_dtype(device, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


# What was prepared for: every backbone's modes, and the same by architecture, for the next one.
_prepared: WeakKeyDictionary[nn.Module, set[tuple]] = WeakKeyDictionary()
_known: set[tuple] = set()


def prepare(model: nn.Module, images: Tensor) -> None:
    """Compiles what a call of a `VMamba` on a GPU is about to ask for, in parallel, once a mode.

    Compiled kernels stay in Triton's cache on the disk, so that the next process finds them.
    """
    # In this order: what torch.fx traces with has no device.
    if needs_dispatcher([images]) or not images.is_cuda:
        return
    mode = Mode(
        # Replicas of data parallelism have tensors in the place of parameters.
        getattr(model.patch_embed[0], "weight", images).dtype,
        autocast_dtype(images),
        torch.is_grad_enabled(),
    )
    call = (images.device, mode)
    done = _prepared.setdefault(model, set())
    # A capture compiles nothing: the first kernel says what to do.
    if call in done or torch.cuda.is_current_stream_capturing():
        return
    done.add(call)
    if (repr(model.arch), call) in _known:
        return
    _known.add((repr(model.arch), call))
    try:
        _compile(model, images, mode)
    except Exception as error:  # noqa: BLE001 - the call works without, and says what does not
        print_log(
            f"VMamba: kernels are compiled one by one, since compiling them ahead failed with "
            f"{type(error).__name__}: {error}",
            logger="current",
            level=logging.WARNING,
        )


def _compile(model: nn.Module, images: Tensor, mode: Mode) -> None:
    if choose("layer_norm", "auto", Problem(images.device, images.dtype, 1, 0))[0].name != "triton":
        return
    from mmvmamba_kernels.backends.triton.precompile import Target, compile_kernels, missing

    with torch.cuda.device(images.device):
        target = Target.here()
    here = (images.shape[0], *images.shape[2:])
    build = partial(model.of_one_block_a_stage, model.arch, model.in_channels)
    kernels = kernels_of(build, [mode], target, (*SHAPES, here))
    todo = len(missing(kernels))
    if not todo:
        return
    what = f"{todo} GPU kernels for {'training' if mode.training else 'inference'}"
    print_log(f"VMamba: compiling {what}, once; the next start finds them.", logger="current")
    told = start = time.perf_counter()

    def tell(_name: str, _seconds: float, left: int) -> None:
        nonlocal told
        now = time.perf_counter()
        if left and now - told >= TELL_EVERY:
            told = now
            print_log(f"VMamba: {left} of {todo} kernels left.", logger="current")

    compile_kernels(kernels, target, progress=tell)
    print_log(f"VMamba: compiled {what} in {time.perf_counter() - start:.0f} s.", logger="current")
