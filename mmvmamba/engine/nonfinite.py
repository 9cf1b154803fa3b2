"""Where a training step makes its first number that is infinite or not a number."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from mmengine.optim import OptimWrapper
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmvmamba.engine.wrappers import unwrapped

MOST_NAMES = 3


def random_states() -> dict:
    """The states of the generators that a training step draws from, as plain data."""
    # Pipelines and models draw from NumPy's global generator.
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    states = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping) -> None:
    """Puts the generators into states that `random_states` gave."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def floating_tensors(data: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Finds the tensors of floating-point numbers in nested data.

    Args:
        data: Containers, mmengine's data elements, mmdet's boxes and masks, arrays, tensors; of
            anything else it finds none.
        path: Where the data itself is to be found.

    Yields:
        Where each tensor is, such as 'data_samples[1].gt_instances.bboxes', and the tensor.
    """
    if isinstance(data, Tensor):
        if data.is_floating_point():
            yield path, data
    elif isinstance(data, np.ndarray):
        if np.issubdtype(data.dtype, np.floating):
            yield path, torch.from_numpy(np.ascontiguousarray(data))
    elif isinstance(data, Mapping | BaseDataElement):
        for key, value in data.items():
            yield from floating_tensors(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list | tuple):
        for i, value in enumerate(data):
            yield from floating_tensors(value, f"{path}[{i}]")
    elif isinstance(getattr(data, "tensor", None), Tensor):
        # mmdet's boxes.
        yield from floating_tensors(data.tensor, path)
    elif isinstance(getattr(data, "masks", None), list):
        # mmdet's polygons.
        yield from floating_tensors(data.masks, path)


def describe(tensor: Tensor) -> str:
    """Shape, dtype, and the largest magnitude or what is not finite."""
    shape = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    undefined, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    if undefined or infinite:
        return f"{shape}, {undefined} nan and {infinite} inf of {tensor.numel()} numbers"
    largest = tensor.detach().abs().max().item() if tensor.numel() else 0.0
    return f"{shape}, up to {largest:.3g}"


def non_finite(data: object) -> list[str]:
    """Describes the tensors in nested data that hold numbers that are not finite."""
    return [
        f"{path} {describe(tensor)}".strip()
        for path, tensor in floating_tensors(data)
        if not tensor.isfinite().all()
    ]


@dataclass(frozen=True)
class Origin:
    """A module that made numbers that are not finite from numbers that are.

    Attributes:
        module: Its name in the model, and its class.
        inputs: What it was given.
        outputs: What of its result is not finite.
        dtypes: The dtypes of its result.
    """

    module: str
    inputs: list[str]
    outputs: list[str]
    dtypes: set[torch.dtype]

    def __str__(self) -> str:
        given = "; ".join(self.inputs) or "no floating-point numbers"
        return f"{self.module}: given {given}; gave {'; '.join(self.outputs)}"


@dataclass
class Trace:
    """What a training step did that changed nothing.

    Attributes:
        losses: What the model logs of it; `loss` is the sum.
        batch: What is not finite in the batch itself.
        weights: What is not finite among the parameters.
        origins: The modules that made such numbers, in the order in which they ran.
        received: Where such numbers first entered a module, if no module had made them.
    """

    losses: dict[str, float] = field(default_factory=dict)
    batch: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    received: str = ""

    @property
    def finite(self) -> bool:
        """Whether the loss was."""
        return bool(np.isfinite(self.losses["loss"]))

    def __str__(self) -> str:
        lines = ["losses: " + ", ".join(f"{k} {v:.4g}" for k, v in self.losses.items())]
        if self.batch:
            lines.append(f"the batch is not finite: {_some(self.batch)}")
        if self.weights:
            lines.append(
                f"the weights were not finite before this step, an earlier one spoilt them: "
                f"{_some(self.weights)}"
            )
        if self.finite:
            lines.append("the step was repeated, and its loss is finite: the fault does not recur")
        elif self.origins:
            lines.append(f"first module with a non-finite result: {self.origins[0]}")
        elif self.received:
            lines.append(self.received)
        else:
            lines.append("all modules' results are finite: made in the losses, outside of modules")
        return "\n".join(f"  {line}" for line in lines)


def _some(lines: list[str]) -> str:
    more = f"; and {len(lines) - MOST_NAMES} more" if len(lines) > MOST_NAMES else ""
    return "; ".join(lines[:MOST_NAMES]) + more


class _Watch:
    """Hooks on all modules of a model that fill a trace."""

    def __init__(self, trace: Trace):
        self._trace = trace
        # Modules that run, outermost first: whether they were given finite numbers.
        self._running: list[bool] = []
        self._last_whole = ""

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        handles = []
        # The model itself, without a name, is left out: it would say nothing.
        for name, module in list(model.named_modules())[1:]:
            label = f"{name} ({type(module).__name__})"
            handles += [
                module.register_forward_pre_hook(self._entering(label), with_kwargs=True),
                module.register_forward_hook(self._leaving(label), with_kwargs=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, label: str):
        def hook(_module, args, kwargs) -> None:
            found = non_finite([args, kwargs])
            self._running.append(not found)
            if found and not self._trace.received and not self._trace.origins:
                before = f", after {self._last_whole}" if self._last_whole else ""
                self._trace.received = (
                    f"no module made them; {label} was given them{before}: {_some(found)}"
                )

        return hook

    def _leaving(self, label: str):
        def hook(_module, args, kwargs, output) -> None:
            was_finite = self._running.pop()
            found = non_finite(output)
            if not found:
                self._last_whole = label
            elif was_finite:
                inputs = [describe(tensor) for _, tensor in floating_tensors([args, kwargs])]
                dtypes = {tensor.dtype for _, tensor in floating_tensors(output)}
                self._trace.origins.append(Origin(label, inputs, found, dtypes))

        return hook


class _DryRun:
    """Stands in for the optimizer's wrapper in a step that must change no weights."""

    def __init__(self, optim_wrapper: OptimWrapper):
        self.optim_context = optim_wrapper.optim_context

    def update_params(self, *_args, **_kwargs) -> None:
        """Updates nothing."""


def trace_step(model: nn.Module, batch: object, optim_wrapper: OptimWrapper) -> Trace:
    """Runs the forward pass of a training step under the eyes of hooks.

    No weight changes, but the statistics of batch norms do. Where the model is wrapped for several
    processes, all of them must call this.

    Args:
        model: The model, in the mode that it trains in.
        batch: What the data loader gave.
        optim_wrapper: Where the step's precision comes from.

    Returns:
        What was found.
    """
    inner = unwrapped(model)
    trace = Trace(batch=non_finite(batch), weights=non_finite(dict(inner.named_parameters())))
    # Compiled code would pass by the hooks.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _Watch(trace).on(inner):
        logged = model.train_step(batch, optim_wrapper=_DryRun(optim_wrapper))
    trace.losses = {name: float(value) for name, value in logged.items()}
    return trace
