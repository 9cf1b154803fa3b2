"""Float32 convolutions and linear layers on CPUs, by PyTorch's libraries.

oneDNN takes the widest vectors that a CPU has, MKL keeps to AVX2 on AMD's. What each is best at:

- Without gradients, oneDNN, for which linear layers are 1x1 convolutions. It lays weights out anew
  in every call, which costs as much as the product where a map has few positions: evaluation keeps
  the laid-out copy. Activations are applied to results while these are in cache.
- With gradients, MKL where vectors are AVX2's: linear layers as PyTorch has them, and the gradients
  of the weights of strided convolutions as products with the patches that these read. oneDNN
  elsewhere.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mmvmamba_kernels.registration import needs_dispatcher

AVAILABLE = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
"""Whether this PyTorch has both libraries; without, its own operators do everything."""

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"

ACTIVATIONS = {
    None: ("none", ""),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
}
"""Activations by what oneDNN's operator calls them, name and algorithm."""

PACKED_POSITIONS = 2048
"""Weights are packed for maps of at most so many positions: above, laying them out takes less than
2 % of the product's time (computed), and a second copy would not pay for its memory."""

SAMPLES = 64
SMALL = 4096
"""Elements of a parameter up to which all of them are samples."""


class Geometry(NamedTuple):
    """How a kernel goes over which maps."""

    shape: tuple[int, ...]
    """Of the maps, (B, C, H, W)."""
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1

    @property
    def positions(self) -> int:
        """Positions of the result, about."""
        batch, _, height, width = self.shape
        return batch * height * width // (self.stride[0] * self.stride[1])


class Snapshot:
    """What dense parameters were when something was made of them.

    `weight.data = ...` gives a weight another place or shape. `weight.data.copy_(...)` changes
    neither these nor its version: exponential averages are updated so, and samples tell of any such
    change to all of a large weight. A change of some rows, columns or elements through `data` or
    NumPy may go unseen until the next `eval()`: PyTorch cannot tell either.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], copied: Sequence[nn.Parameter]):
        """`copied` are those of them whose values were copied: others may change in place."""
        # These hold the memory, so that nothing else comes to be there.
        self._memory = [parameter.detach() for parameter in parameters]
        self._samples = [_samples(parameter.detach()) for parameter in copied]
        self._sampled = [samples.clone() for samples in self._samples]
        self._signs = _signs(parameters)

    def is_of(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether it is that of these parameters, as they are now."""
        # In this order: what was sampled may have been freed, as by `share_memory_()`.
        return _signs(parameters) == self._signs and all(
            map(torch.equal, self._samples, self._sampled)
        )


def _signs(parameters: Sequence[nn.Parameter]) -> tuple[list, ...]:
    return (
        [parameter._version for parameter in parameters],
        list(map(Tensor.data_ptr, parameters)),
        list(map(Tensor.stride, parameters)),
        list(map(Tensor.size, parameters)),
    )


class _Packed(NamedTuple):
    """A weight as oneDNN wants it for some maps."""

    copy: Tensor
    geometry: Geometry
    weight: Snapshot


_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def serves(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether :func:`convolve` is for such a call, here and now.

    Compilers choose themselves; tracers, transforms and counters want operators that they know.
    """
    return (
        AVAILABLE
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not needs_dispatcher([x, *(p for p in parameters if p is not None)])
        and all(
            p is None or (p.dtype == torch.float32 and p.device.type == "cpu") for p in parameters
        )
        # Tangents of forward-mode differentiation.
        and torch.autograd.forward_ad._current_level < 0
    )


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def fuses(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether :func:`convolve` may apply an activation to its result in the same pass."""
    return not records(x, *parameters) and serves(x, *parameters)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
    act: str | None = None,
) -> Tensor:
    """A convolution that :func:`serves` said yes to.

    Args:
        x: (B, C, H, W), in torch's channels_last memory format or copied to it.
        weight: (O, C / groups, kernel height, kernel width), or (..., C) of a linear layer, whose
            outputs O are all but the last dimension.
        bias: (O,) or None.
        stride: Steps of the kernel, in positions.
        padding: Zeros around the map.
        groups: As `nn.Conv2d`'s.
        act: A key of `ACTIVATIONS`, applied to the result; only where :func:`fuses` says yes.

    Returns:
        (B, O, H', W'), in the channels_last memory format.
    """
    if not records(x, weight, bias):
        return planned(Geometry(tuple(x.shape), stride, padding, groups), weight, bias, act)(x)
    kernel = _kernel(weight)
    if AVX512 or groups > 1 or tuple(kernel.shape[2:]) == (1, 1):
        return F.conv2d(x, kernel, bias, stride, padding, groups=groups)
    return _Convolution.apply(x, kernel, bias, stride, padding)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str | None = None) -> Tensor:
    """A linear layer on maps that :func:`serves` said yes to.

    Args:
        x: (B, H, W, C).
        weight: (..., C), whose outputs O are all but the last dimension.
        bias: (O,) or None.
        act: As :func:`convolve`'s.

    Returns:
        (B, H, W, O).
    """
    if AVX512 or not records(x, weight, bias):
        return convolve(x.permute(0, 3, 1, 2), weight, bias, act=act).permute(0, 2, 3, 1)
    return F.linear(x, weight.flatten(0, -2), bias)


def planned(
    geometry: Geometry, weight: Tensor, bias: Tensor | None, act: str | None = None
) -> Callable[[Tensor], Tensor]:
    """:func:`convolve` without gradients, for maps of one shape.

    The function that it returns need not see that parameters change.
    """
    attr, algorithm = ACTIVATIONS[act]
    operator = torch.ops.mkldnn._convolution_pointwise.default
    _, stride, padding, groups = geometry
    rest = bias, padding, stride, (1, 1), groups, attr, [], algorithm
    if not _keeps(weight, geometry):
        kernel = _kernel(weight.detach())
        return lambda x: operator(x, kernel, *rest)
    copy = _pack(weight, geometry)
    return lambda x: operator(x, copy, *rest)


def forget(parameters: Iterable[Tensor]) -> None:
    """Drops what evaluation keeps of these."""
    for parameter in parameters:
        _packed.pop(parameter, None)


def _kernel(weight: Tensor) -> Tensor:
    """The weight in four dimensions."""
    return weight if weight.dim() == 4 else weight.flatten(0, -2)[:, :, None, None]


def _keeps(weight: Tensor, geometry: Geometry) -> bool:
    """Whether keeping a copy of the weight as oneDNN wants it pays, and can be told from others."""
    return geometry.positions <= PACKED_POSITIONS and shows_changes(weight)


def _pack(weight: nn.Parameter, geometry: Geometry) -> Tensor:
    """The weight's copy for such maps: the one that is kept, or a new one in its place."""
    packed = _packed.get(weight)
    if packed is None or packed.geometry != geometry or not packed.weight.is_of([weight]):
        # For another shape oneDNN may want another order, and changes one into the other slowly.
        shape, stride, padding, groups = geometry
        copy = torch.ops.aten.mkldnn_reorder_conv2d_weight(
            _kernel(weight.detach()).contiguous().to_mkldnn(),
            *(padding, stride, (1, 1), groups, shape),
        )
        packed = _packed[weight] = _Packed(copy, geometry, Snapshot([weight], [weight]))
    return packed.copy


def shows_changes(weight: Tensor) -> bool:
    """Whether a :class:`Snapshot` of it would tell of changes."""
    return type(weight) is nn.Parameter and not weight.is_inference() and _is_dense(weight)


def _is_dense(weight: Tensor) -> bool:
    """Whether its elements fill a piece of memory."""
    if weight.is_contiguous():
        return True
    return weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)


def _samples(weight: Tensor) -> Tensor:
    """Some elements, spread over the memory of a dense weight; all of a small one."""
    if weight.numel() <= SMALL:
        return weight.as_strided((weight.numel(),), (1,))
    # One less than would fill it: a multiple of the columns would stay in one of them.
    return weight.as_strided((SAMPLES,), (weight.numel() // SAMPLES - 1,))


class _Convolution(torch.autograd.Function):
    """`F.conv2d` whose gradients in kernel and bias are a matrix product and a sum."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.permute(0, 2, 3, 1).flatten(0, 2)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(
                grad,
                x,
                weight,
                None,
                ctx.stride,
                ctx.padding,
                (1, 1),
                False,
                (0, 0),
                1,
                (True, False, False),
            )[0]
        if ctx.needs_input_grad[1]:
            kernel = weight.shape[2:]
            patches = _patches(x, kernel, ctx.stride, ctx.padding)
            grad_weight = (rows.t() @ patches).unflatten(1, (*kernel, -1)).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, None


def _patches(
    x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """What a kernel reads at each of its positions: (B H' W', kernel height * width * C)."""
    x = x.permute(0, 2, 3, 1)
    x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    batch, height, width, channels = x.shape
    steps = x.stride()
    out = [(size - k) // s + 1 for size, k, s in zip((height, width), kernel, stride, strict=True)]
    patches = x.as_strided(
        (batch, *out, *kernel, channels),
        (steps[0], steps[1] * stride[0], steps[2] * stride[1], *steps[1:]),
    )
    return patches.flatten(0, 2).flatten(1)
