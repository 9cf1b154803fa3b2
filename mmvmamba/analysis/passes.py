"""One pass of a model over a batch, in a given precision, compared with the same pass in fp32."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmvmamba.analysis.measured import Ranked, image_channels, random_images, tensors
from mmvmamba.models import VMamba
from mmvmamba.models.precompile import MODES
from mmvmamba.models.vmamba import COMPILE_OPTIONS

PASSES = ("inference", "training")
PRECISIONS = tuple(MODES)
RUNTIMES = ("onnxruntime", "onnxruntime+cpp", "openvino")
FROZEN = "compiled+frozen"
EXECUTIONS = ("eager", "compiled", FROZEN, "graph", "compiled+graph")
MEMORY_FORMATS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}

PassName = Literal["inference", "training"]
PrecisionName = Literal["fp32", "autocast-bf16", "autocast-fp16", "bf16"]
ExecutionName = Literal[
    "eager",
    "compiled",
    "compiled+frozen",
    "graph",
    "compiled+graph",
    "onnxruntime",
    "onnxruntime+cpp",
    "openvino",
]
MemoryFormatName = Literal["channels-last", "contiguous"]

AUTOCAST_DTYPES = {name: autocast for name, (_, autocast) in MODES.items() if autocast}

# Largest accepted |mode - reference| / |reference| (L2 norms) of the outputs and, over all
# parameters together, of the gradients. TF32 has the mantissa of float16.
TOLERANCES = {
    "fp32": (1e-2, 1e-1),
    "autocast-fp16": (1e-2, 1e-1),
    "autocast-bf16": (5e-2, 5e-1),
    "bf16": (5e-2, 5e-1),
}

# Gradients of float16 training would vanish without it.
LOSS_SCALE = 1024.0
WARM_UP_CALLS = 2
WARM_BY_REFERENCE = ("cpu", "eager", "fp32")


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        passes: 'inference', or 'training': forward and backward, no optimizer. Classifiers have
            cross entropy as their loss; from other models' outputs, given gradients go back.
        precision: 'fp32' (TF32 on GPUs), 'autocast-bf16', 'autocast-fp16', or 'bf16' for weights
            and images in bfloat16.
        batch: Images in a batch.
        size: Height and width of the images in pixels.
        execution: 'eager', 'compiled' (`torch.compile`), 'compiled+frozen' (with the weights as
            constants, Inductor's option `freezing`), 'graph' (a CUDA graph of the whole pass),
            'compiled+graph', or one of `RUNTIMES`, to which the model is exported.
        memory_format: Of weights and images: 'channels-last' or 'contiguous'.
    """

    passes: PassName
    precision: PrecisionName
    batch: int
    size: tuple[int, int]
    execution: ExecutionName = "eager"
    memory_format: MemoryFormatName = "channels-last"

    def __str__(self) -> str:
        parts = (self.passes, self.precision, self.execution, self.shape)
        return ", ".join(parts + (self.memory_format,) * (self.memory_format == "contiguous"))

    @property
    def shape(self) -> str:
        """Batch x height x width."""
        return "x".join(map(str, (self.batch, *self.size)))

    def row(self) -> dict:
        """The case as columns of a CSV file."""
        row = dataclasses.asdict(self)
        row["height"], row["width"] = row.pop("size")
        return row

    def check_device(self, device: torch.device) -> None:
        """Refuses what a device cannot do.

        Raises:
            ValueError: If the case needs a CUDA graph and the device is not CUDA, constant weights
                and trains, or a runtime that is for inference in fp32 on the CPU and the case is
                something else.
        """
        other = (self.passes, self.precision, device.type) != ("inference", "fp32", "cpu")
        if self.execution in RUNTIMES and other:
            raise ValueError(
                f"{self.execution} runs inference in fp32 on the CPU: give --passes inference "
                "--precision fp32 --device cpu."
            )
        if self.execution == FROZEN and self.passes != "inference":
            raise ValueError(
                f"{FROZEN} makes the weights constant, so it cannot train: give --passes inference."
            )
        if "graph" in self.execution and device.type != "cuda":
            raise ValueError(
                f"a CUDA graph (execution {self.execution!r}) needs a CUDA device, got {device}. "
                "Choose eager or compiled there."
            )


class Step:
    """One pass of a model over one batch, in fp32 for reference and then as a case asks.

    Args:
        model: The model, on the device and in the mode of the pass.
        case: What to run.
        device: Where.
        classifies: Whether training puts cross entropy on the output.
    """

    def __init__(self, model: nn.Module, case: Case, device: torch.device, classifies: bool):
        self.model, self.case, self.device, self.classifies = model, case, device, classifies
        self.parameters = list(model.parameters())
        self.images = random_images(case.batch, case.size, device, image_channels(model))
        self.images = self.images.contiguous(memory_format=MEMORY_FORMATS[case.memory_format])
        self.scale = LOSS_SCALE if case.precision == "autocast-fp16" else 1.0
        self.labels: Tensor | None = None
        self.output_grads: list[Tensor] = []

    def reference(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and, in training, gradients in fp32, eager, without TF32."""
        with tf32(False):
            outputs = self._run(self.model, nullcontext)
        found = list(_comparable(outputs)), self._gradients(outputs)
        for parameter in self.parameters:
            parameter.grad = None
        self.output_grads = []
        return found

    def prepare(self) -> Callable[[], object]:
        """The pass in the case's precision and, but for CUDA graphs, execution, warmed up."""
        model = self.model
        if self.case.precision == "bf16":
            self.model.to(torch.bfloat16)
            self.images = self.images.to(torch.bfloat16)
        if "compiled" in self.case.execution:
            ours = any(isinstance(module, VMamba) for module in model.modules())
            options = COMPILE_OPTIONS if ours else {}
            if self.case.execution == FROZEN:
                options = options | {"freezing": True}
            model = torch.compile(model, options=options)
        if self.case.execution in RUNTIMES:
            from mmvmamba.deployment.runtimes import in_runtime

            model = in_runtime(model, self.images, self.case.execution)
        dtype = AUTOCAST_DTYPES.get(self.case.precision)
        cast = partial(torch.autocast, self.device.type, dtype) if dtype else nullcontext
        call = partial(self._run, model, cast)
        # Eager and in fp32, the CPU has had its first call: the reference.
        warm = (self.device.type, self.case.execution, self.case.precision) == WARM_BY_REFERENCE
        # Other streams than the default one are what graphs are captured on.
        with _side_stream() if "graph" in self.case.execution else nullcontext():
            for _ in range(0 if warm else WARM_UP_CALLS):
                call()
        return call

    def check(self, outputs, reference: tuple[list[Tensor], list[Tensor]]) -> float:
        """Compares a call's outputs and gradients with those in fp32.

        Returns:
            The relative error of the outputs.

        Raises:
            FloatingPointError: If something is not finite or too far away: its time means nothing.
        """
        expected, expected_grads = reference
        if not all(bool(t.isfinite().all()) for t in tensors(outputs)):
            raise FloatingPointError("the output is not finite")
        allowed, allowed_grads = TOLERANCES[self.case.precision]
        error = _relative_error(list(_comparable(outputs)), expected)
        if not error <= allowed:
            raise FloatingPointError(
                f"the output is {error:.1e} away from its own in fp32, allowed is {allowed:.0e}"
            )
        if self.case.passes == "training":
            found = [p.grad for p in self.parameters if p.grad is not None]
            if not found or not all(bool(grad.isfinite().all()) for grad in found):
                raise FloatingPointError("there are no gradients, or they are not finite")
            error_grads = _relative_error(self._gradients(outputs), expected_grads)
            if not error_grads <= allowed_grads:
                raise FloatingPointError(
                    f"the gradients are {error_grads:.1e} away from those in fp32, allowed is "
                    f"{allowed_grads:.0e}"
                )
        return error

    def _run(self, model: nn.Module, cast: Callable[[], AbstractContextManager]):
        if self.case.passes == "inference":
            with torch.inference_mode(), cast():
                return model(self.images)
        for parameter in self.parameters:
            parameter.grad = None
        with cast():
            outputs = model(self.images)
        self._backward([t for t in tensors(outputs) if t.requires_grad])
        return _detached(outputs)

    def _backward(self, outputs: list[Tensor]) -> None:
        if not outputs:
            raise RuntimeError("no output has a gradient")
        if self.classifies:
            logits = outputs[0].float()
            if self.labels is None:
                self.labels = torch.arange(len(logits), device=self.device) % logits.shape[1]
            (F.cross_entropy(logits, self.labels) * self.scale).backward()
            return
        if not self.output_grads:
            self.output_grads = list(_given_gradients(outputs, self.scale))
        torch.autograd.backward(outputs, self.output_grads)

    def _gradients(self, outputs) -> list[Tensor]:
        """The parameters' gradients, if there are any that can be compared.

        Batch norm of few numbers, as in pooled maps, is too sensitive to rounding errors for that.
        """
        sensitive = any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules())
        if self.case.passes == "inference" or sensitive or isinstance(outputs, Ranked):
            return []
        return [_kept(p.grad) / self.scale for p in self.parameters if p.grad is not None]


def _kept(tensor: Tensor) -> Tensor:
    """A copy that takes no memory of the device, where the peak is measured."""
    return tensor.detach().float().cpu()


def _comparable(outputs) -> Iterator[Tensor]:
    chosen = outputs.features if isinstance(outputs, Ranked) else outputs
    return (_kept(t) for t in tensors(chosen))


def _detached(outputs):
    """The same nested outputs without their graph, whose tensors would otherwise be kept."""
    if isinstance(outputs, Ranked):
        return Ranked(*(_detached(part) for part in outputs))
    return [t.detach() for t in tensors(outputs)]


def _given_gradients(outputs: Sequence[Tensor], scale: float) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for output in outputs:
        # Of norm one, as those of a mean are.
        grad = torch.randn(output.shape, generator=generator) / max(output.numel(), 1) ** 0.5
        yield (grad * scale).to(output.device, output.dtype)


def _relative_error(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """|values - expected| / |expected|, in L2 norms over all tensors together."""
    if [v.shape for v in values] != [e.shape for e in expected]:
        raise FloatingPointError(
            f"{len(values)} tensors in this mode, {len(expected)} in fp32, or of other shapes"
        )

    def norm(parts: Iterator[Tensor]) -> float:
        return sum(float(part.double().square().sum()) for part in parts) ** 0.5

    difference = norm(v - e for v, e in zip(values, expected, strict=True))
    return difference / max(norm(iter(expected)), 1e-30)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Switches TF32 on or off for matrix products and convolutions."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = allowed
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


@contextmanager
def _side_stream() -> Iterator[None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
