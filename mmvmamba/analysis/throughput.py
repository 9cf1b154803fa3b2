"""Throughput and memory of classifiers, ours and timm's, measured in one way."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmvmamba.models import VMamba
from mmvmamba.registry import MODELS

PASSES = ("inference", "training")
PRECISIONS = ("fp32", "autocast", "bf16")

PassName = Literal["inference", "training"]
PrecisionName = Literal["fp32", "autocast", "bf16"]

NUM_CLASSES = 1000
WARM_UP_CALLS = 2
LEAST_CALLS = 5


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        passes: 'inference', or 'training': forward, cross entropy and backward, no optimizer.
        precision: 'fp32' (TF32 on GPUs), 'autocast' (to bfloat16), or 'bf16' for weights and input.
        batch: Images in a batch.
        size: Side of the images in pixels.
        compiled: Whether the model goes through `torch.compile`.
    """

    passes: PassName
    precision: PrecisionName
    batch: int
    size: int
    compiled: bool = False


@dataclass(frozen=True)
class Result:
    """One model in one case.

    Attributes:
        model: The model's name.
        params: Its number of parameters.
        seconds: Median time of a call; `p20` and `p80` are percentiles.
        images_per_second: Batch over the median.
        peak_gb: Peak memory of the device in GB (1e9 bytes), None on the CPU.
    """

    model: str
    case: Case
    params: int
    seconds: float
    p20: float
    p80: float
    images_per_second: float
    peak_gb: float | None

    def row(self) -> dict:
        """The result as one flat row for a CSV file."""
        row = dataclasses.asdict(self)
        return row | row.pop("case")


def build_classifier(name: str) -> nn.Module:
    """Makes a classifier of 1000 classes with random weights.

    Args:
        name: An arch of `VMamba`, or the name of a model of timm.

    Raises:
        ValueError: If it is neither.
    """
    if name in VMamba.arch_settings or name in VMamba.arch_aliases:
        backbone = VMamba(name, out_indices=(-1,), outnorm=False)
        head = {
            "type": "mmvmamba.VMambaClsHead",
            "num_classes": NUM_CLASSES,
            "in_channels": backbone.arch.dims[-1],
        }
        return nn.Sequential(backbone, MODELS.build(head))
    import timm

    if not timm.is_model(name):
        raise ValueError(
            f"{name!r} is neither an arch of VMamba ({', '.join(VMamba.arch_settings)}) nor a "
            "model of timm (timm.list_models() names them)."
        )
    return timm.create_model(name, num_classes=NUM_CLASSES)


def measure(name: str, case: Case, device: torch.device, seconds: float) -> Result:
    """Times one model, after checking that its outputs are finite.

    Args:
        name: See `build_classifier`.
        case: What to time.
        device: Where.
        seconds: How long to go on; at least five calls are timed.

    Returns:
        The result.

    Raises:
        FloatingPointError: If the model's output is not finite: such a run's time means nothing.
    """
    model = build_classifier(name).to(device)
    params = sum(p.numel() for p in model.parameters())
    call = _prepare(model, case, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UP_CALLS):
        if not torch.isfinite(call()).all():
            raise FloatingPointError(f"{name} gives values that are not finite in {case}.")
    times = sorted(_timed_calls(call, device, seconds))
    median = statistics.median(times)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return Result(
        name,
        case,
        params,
        median,
        p20=times[len(times) // 5],
        p80=times[len(times) * 4 // 5],
        images_per_second=case.batch / median,
        peak_gb=peak,
    )


def _prepare(model: nn.Module, case: Case, device: torch.device) -> Callable[[], Tensor]:
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    model = model.to(dtype)
    images = torch.randn(case.batch, 3, case.size, case.size, device=device, dtype=dtype)
    labels = torch.arange(case.batch, device=device) % NUM_CLASSES
    parameters = list(model.parameters())
    model = model.train(case.passes == "training")
    if case.compiled:
        model = torch.compile(model)

    def cast() -> AbstractContextManager:
        if case.precision == "autocast":
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()

    @torch.inference_mode()
    def inference() -> Tensor:
        with cast():
            return model(images)

    def training() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        with cast():
            loss = nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        return loss.detach()

    return inference if case.passes == "inference" else training


def _timed_calls(
    call: Callable[[], Tensor], device: torch.device, seconds: float
) -> Iterator[float]:
    begin, calls = time.perf_counter(), 0
    while calls < LEAST_CALLS or time.perf_counter() - begin < seconds:
        before = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield time.perf_counter() - before
        calls += 1
