"""Depth-wise 3x3 convolution, bias and activation in one: public function, checks, registration.

The operator is for kernels of our own. Where PyTorch's operations are what runs, on the CPU or
without Triton, and in graphs that are compiled or exported, whose compiler joins the activation
with what follows, they are called directly.
"""

from __future__ import annotations

from torch import Tensor

from mmvmamba_kernels.arguments import check_positive, check_rank, check_shape, check_tensors
from mmvmamba_kernels.backends.triton import support as triton_support
from mmvmamba_kernels.depthwise_conv import reference
from mmvmamba_kernels.depthwise_conv.arguments import Arguments
from mmvmamba_kernels.dispatch import Backend, check_name, plain_or_pinned, register_backend
from mmvmamba_kernels.registration import Operator

_OP = "depthwise_conv"

ACTIVATIONS = ("silu", "gelu", "relu", "none")

register_backend(_OP, Backend("triton", f"{__package__}.triton_impl", triton_support.can_run))
register_backend(_OP, Backend("reference", f"{__package__}.reference"))


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """Convolve every channel of a map with its own 3x3 filter, add a bias and apply an activation.

    ``y[b, i, j, c] = act(bias[c] + sum over p, q in 0..2 of weight[c, 0, p, q] x[b, i + p - 1,
    j + q - 1, c])``, with zeros outside the map: stride 1, padding 1.

    Sums are float32 (float64 if any argument is float64), whatever the arguments' dtypes and
    whether or not autocast is on. Differentiable once in x, weight and bias, each gradient in its
    argument's dtype; ``x`` is all that is saved of the map. Deterministic, where PyTorch's own
    convolution runs as far as that is.

    Args:
        x: The map, (B, H, W, C), channels last.
        weight: The filters in the layout of ``torch.nn.Conv2d`` with C groups, (C, 1, 3, 3), of any
            strides.
        bias: (C,), or None for none.
        act: 'silu', 'gelu' (with erf, not its approximation), 'relu' or 'none'.
        backend: Name of the implementation; None chooses one per call (see
            :mod:`mmvmamba_kernels.dispatch`).

    Returns:
        (B, H, W, C), in the dtype of ``x``.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If shapes or devices do not fit one another, or the activation is unknown.
        BackendError: If the backend does not exist or cannot run this call.
    """
    check_tensors(_OP, {"x": x, "weight": weight, "bias": bias}, optional=("bias",))
    if act not in ACTIVATIONS:
        raise ValueError(f"{_OP}: act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    check_rank(_OP, "x", x, "(B, H, W, C)")
    _, height, width, channels = x.shape
    check_positive(_OP, H=height, W=width, C=channels)
    check_shape(_OP, "weight", weight, "(C, 1, 3, 3)", (channels, 1, 3, 3))
    check_shape(_OP, "bias", bias, "(C,)", (channels,))
    name = check_name(_OP, backend)
    if backend is None:
        name = plain_or_pinned(_OP, x.device, x.dtype)
        if name is None:
            return reference.convolve(x, weight, bias, act)
    return _operator(Arguments(x, weight, bias, act), name)


def _sizes(shapes: Arguments) -> tuple[int, int]:
    batch, height, width, channels = shapes.x
    return batch * height * width * channels, 1


def _flops(shapes: Arguments) -> int:
    # As PyTorch counts its convolutions, without bias and activation.
    return 2 * 9 * _sizes(shapes)[0]


_operator = Operator(_OP, Arguments, _sizes, _flops)
