"""The 2D selective scan in CUDA C++, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.backends import gpu_scan
from mmvmamba_kernels.backends.native import cpp_scan, cuda_scan
from mmvmamba_kernels.selective_scan_2d.arguments import Arguments

MAX_RANK = 64
"""Largest dt rank that kernels expand; beyond it raw step sizes are a matrix product."""


def carries_shape(scan: Arguments) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves for the backward pass."""
    return cuda_scan.carries_shape(*scan.x.shape, scan.A.shape[2], scan.directions)


def _every_direction(maps: Tensor, directions: int) -> Tensor:
    """(B, H, W, D) -> (K, positions, D): every direction reads the same map."""
    return maps.flatten(0, 2).expand(directions, -1, -1)


def _arguments(scan: Arguments) -> tuple:
    x, proj, dt_weight, dt_bias, A, D = scan[:6]
    dtype = state_dtype(*scan)
    delta, weight = None, cuda_scan.parameter(dt_weight.mT, dtype)
    if dt_weight.shape[2] > MAX_RANK:
        delta, weight = gpu_scan.raw_step_sizes(proj, dt_weight, dtype), None
    return (
        _every_direction(x.to(cuda_scan.map_dtype(dtype, x)).contiguous(), len(scan.directions)),
        delta,
        proj.contiguous().flatten(0, 2),
        weight,
        cuda_scan.parameter(dt_bias, dtype),
        cuda_scan.parameter(A.mT, dtype),
        cuda_scan.parameter(D, dtype),
        *x.shape[:3],
        cpp_scan.path_codes(scan.directions),
        True,
    )


def _partial_sums(maps: Tensor) -> Tensor:
    """Memory for the sums over directions, (buffers, positions, D).

    In bfloat16 every direction has its own. Wider ones are two for all directions, of which later
    launches add to the first one's.
    """
    dtype, directions = gpu_scan.partial_dtype(maps.dtype), maps.shape[0]
    buffers = directions if dtype == torch.bfloat16 else min(directions, 2)
    return maps.new_empty((buffers, *maps.shape[1:]), dtype=dtype)


def forward(scan: Arguments, save_carries: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan_2d`.

    Returns:
        The output in ``x``'s dtype, and states along every path in the state's dtype (no elements
        unless ``save_carries``).
    """
    x, arguments = scan.x, _arguments(scan)
    shape = carries_shape(scan) if save_carries else (0,)
    carries = x.new_empty(shape, dtype=state_dtype(*scan))
    parts = _partial_sums(arguments[0])
    cuda_scan.operators().scan_forward(*arguments, parts, carries if save_carries else None)
    return parts.sum(0).view(x.shape).to(x.dtype), carries


def backward(
    grad_out: Tensor, carries: Tensor, scan: Arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan_2d.reference.backward`."""
    arguments = _arguments(scan)
    maps = arguments[0]
    grad_maps = _every_direction(grad_out.to(maps.dtype).contiguous(), maps.shape[0])
    parts = _partial_sums(maps)
    # Products take the gradient of the raw step sizes from here, on tensor cores if x is bfloat16.
    raw = maps.new_empty(maps.shape, dtype=parts.dtype)
    grad_weights, grad_A, grad_D = cuda_scan.operators().scan_backward(
        grad_maps, carries, *arguments, parts, raw
    )
    x, proj, dt_weight, dt_bias, A, D = scan[:6]
    grad_proj, grad_weight, grad_bias = cuda_scan.low_rank_gradients(
        raw, grad_weights, proj, dt_weight, carries.dtype
    )
    return (
        parts.sum(0).view(x.shape).to(x.dtype),
        grad_proj,
        cpp_scan.cast_like(grad_weight, dt_weight),
        cpp_scan.cast_like(grad_bias, dt_bias),
        cpp_scan.cast_like(grad_A.mT, A),
        cpp_scan.cast_like(grad_D, D),
    )
