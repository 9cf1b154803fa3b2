"""Maps that training computes again in the backward pass, where it would otherwise keep them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmvmamba_kernels.registration import is_transformed

DEVICES = {"cuda"}
"""Where: memory is what limits training on GPUs, on CPUs it is time."""


class Origin(NamedTuple):
    """How a tensor was computed from others that are kept in any case.

    Attributes:
        function: Makes it from `inputs`, as often as one likes.
        inputs: Arguments of `function`.
        version: The tensor's version then: in-place operations leave its origin behind.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    version: int


def recomputes(x: Tensor) -> bool:
    """Whether maps like `x` may be computed again, here and now.

    Compilers decide that themselves. Tracers and transforms want operations that they know.
    """
    return (
        x.device.type in DEVICES
        and x.requires_grad
        and torch.is_grad_enabled()
        and not x.is_inference()
        and not is_transformed()
    )


def with_origin(y: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Notes on `y` that it is `function(*inputs)`, for the linear layer that takes it.

    The note is an attribute of this very tensor, so that a hook or a layer in the place of ours
    that makes another one of it leaves the note behind. One that writes through `y.data` does not:
    PyTorch cannot tell either.

    Returns:
        `y`.
    """
    if recomputes(y):
        y.origin = Origin(function, inputs, y._version)
    return y


def origin_of(x: Tensor) -> Origin | None:
    """The origin of a tensor; None if there is none, or if the tensor changed since."""
    origin = getattr(x, "origin", None) if recomputes(x) else None
    return origin if origin is not None and origin.version == x._version else None


class LinearOf(torch.autograd.Function):
    """`F.linear(x, weight, bias)` of an `x` that is not kept but computed again.

    Normalised and activated maps are the inputs of a block's linear layers and a third of what
    training would hold, and one pass over memory makes them again from what is held besides.
    Differentiable once: some of what is held is cut off from the graph.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        function: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
    ) -> Tensor:
        """The product, all in one dtype; `x` is `function(*inputs)` but for its dtype."""
        ctx.function = function
        ctx.save_for_backward(weight, *inputs)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight).unflatten(0, grad.shape[:-1])
        if ctx.needs_input_grad[1]:
            grad_weight = rows.t() @ ctx.function(*inputs).to(rows.dtype).flatten(0, -2)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, None
