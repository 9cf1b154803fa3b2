"""The depth-wise convolution in plain PyTorch: the specification, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.depthwise_conv.arguments import Arguments
from mmvmamba_kernels.registration import autocast_off

_aten = torch.ops.aten

_FORWARD = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "none": lambda z: z}
_BACKWARD = {
    "silu": _aten.silu_backward,
    "gelu": _aten.gelu_backward,
    "relu": lambda grad, z: _aten.threshold_backward(grad, z, 0),
    "none": lambda grad, _: grad,
}


def _operands(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of a convolution, NCHW and of one dtype.

    A map of low precision stays so: PyTorch's convolutions of it have float32 sums.
    """
    dtype = state_dtype(x, weight, bias)
    if dtype != torch.float64:
        dtype = x.dtype
    x = x.to(dtype).permute(0, 3, 1, 2)
    return x, weight.to(dtype), None if bias is None else bias.to(dtype)


def _preactivation(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    z = F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    if z.dtype == torch.float16 and act in ("silu", "gelu"):
        # Both tend to zero, but -inf times zero is NaN.
        z = z.clamp_min(torch.finfo(torch.float16).min)
    return z


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """:func:`mmvmamba_kernels.depthwise_conv` of PyTorch's own operations, differentiable."""
    with autocast_off(x):
        z = _preactivation(*_operands(x, weight, bias), act)
        return _FORWARD[act](z).permute(0, 2, 3, 1).to(x.dtype)


def carries_shape(_: Arguments) -> tuple[int, ...]:
    """Nothing is saved beside the arguments."""
    return (0,)


def forward(arguments: Arguments, save_carries: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.depthwise_conv`.

    Returns:
        The output in ``x``'s dtype, and a tensor without elements.
    """
    del save_carries
    out = convolve(*arguments)
    return out.contiguous(), out.new_empty(0, dtype=state_dtype(*arguments))


def backward(
    grad_out: Tensor, carries: Tensor, arguments: Arguments
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of :func:`forward`.

    Args:
        grad_out: Gradient of the output, like ``x``.
        carries: What :func:`forward` saved: nothing.
        arguments: As in the forward pass.

    Returns:
        The gradients of x, weight and bias, each in its own dtype; None for an absent bias.
    """
    del carries
    x, weight, bias, act = arguments
    maps, filters, shift = _operands(x, weight, bias)
    z = _preactivation(maps, filters, shift, act)
    grad_z = _BACKWARD[act](grad_out.to(maps.dtype).permute(0, 3, 1, 2), z)
    channels = x.shape[3]
    grad_x, grad_weight, grad_bias = _aten.convolution_backward(
        grad_z,
        maps,
        filters,
        [channels],
        [1, 1],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        channels,
        [True, True, bias is not None],
    )
    return (
        grad_x.permute(0, 2, 3, 1).to(x.dtype).contiguous(),
        grad_weight.to(weight.dtype).contiguous(),
        None if bias is None else grad_bias.to(bias.dtype),
    )
