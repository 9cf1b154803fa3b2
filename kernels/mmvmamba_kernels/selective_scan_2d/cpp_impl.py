"""The 2D selective scan in C++: on the CPU here, on an NVIDIA GPU in :mod:`.cuda_impl`."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.backends.native import cpp_scan
from mmvmamba_kernels.patterns import PATTERNS
from mmvmamba_kernels.selective_scan_2d import cuda_impl


def carries_shape(x: Tensor, A: Tensor, pattern: str, **_) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves for the backward pass."""
    if x.is_cuda:
        return cuda_impl.carries_shape(x, A, pattern)
    return cpp_scan.carries_shape(*x.shape, A.shape[2], PATTERNS[pattern])


def _arguments(
    x: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, pattern: str
) -> tuple:
    dtype = state_dtype(x, proj, dt_weight, dt_bias, A, D)
    x, proj, dt_weight, dt_bias, A, D = (t.to(dtype) for t in (x, proj, dt_weight, dt_bias, A, D))
    codes = cpp_scan.path_codes(PATTERNS[pattern])
    _, height, width, _ = x.shape
    positions = x.contiguous().flatten(1, 2)
    coefficients = proj.contiguous().flatten(1, 2)
    return positions, None, coefficients, dt_weight, dt_bias, A, D, height, width, codes, True


def forward(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: str,
    save_carries: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan_2d`.

    Returns:
        The output in ``x``'s dtype, and states along every path in the state's dtype (no elements
        unless ``save_carries``).
    """
    if x.is_cuda:
        return cuda_impl.forward(x, proj, dt_weight, dt_bias, A, D, pattern, save_carries)
    arguments = _arguments(x, proj, dt_weight, dt_bias, A, D, pattern)
    positions = arguments[0]
    out = torch.empty_like(positions)
    carries = positions.new_empty(carries_shape(x, A, pattern) if save_carries else (0,))
    torch.ops.mmvmamba_cpp.scan_forward(*arguments, out, carries if save_carries else None)
    return out.view(x.shape).to(x.dtype), carries


def backward(
    grad_out: Tensor,
    carries: Tensor,
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`forward`.

    Args:
        grad_out: Gradient of the output, like ``x``.
        carries: What :func:`forward` saved.
        x: As in the forward pass; so are the rest.

    Returns:
        The gradients of x, proj, dt_weight, dt_bias, A and D, each in its own dtype.
    """
    if x.is_cuda:
        return cuda_impl.backward(grad_out, carries, x, proj, dt_weight, dt_bias, A, D, pattern)
    arguments = _arguments(x, proj, dt_weight, dt_bias, A, D, pattern)
    positions = arguments[0]
    grad_out = grad_out.to(positions.dtype).contiguous().flatten(1, 2)
    grad_x = torch.empty_like(positions)
    grads = torch.ops.mmvmamba_cpp.scan_backward(grad_out, carries, *arguments, grad_x, None)
    grad_proj, grad_weight, grad_bias, grad_A, grad_D = grads
    return (
        grad_x.view(x.shape).to(x.dtype),
        grad_proj.view(proj.shape).to(proj.dtype),
        cpp_scan.cast_like(grad_weight, dt_weight),
        cpp_scan.cast_like(grad_bias, dt_bias),
        cpp_scan.cast_like(grad_A, A),
        cpp_scan.cast_like(grad_D.expand_as(D), D),
    )
