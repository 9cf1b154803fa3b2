"""The 2D selective scan in C++: on the CPU here, on an NVIDIA GPU in :mod:`.cuda_impl`."""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.backends.native import cpp_scan
from mmvmamba_kernels.path_lists import PathLists
from mmvmamba_kernels.selective_scan_2d import cuda_impl
from mmvmamba_kernels.selective_scan_2d.arguments import Arguments


def carries_shape(scan: Arguments) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves for the backward pass."""
    if scan.x.is_cuda:
        return cuda_impl.carries_shape(scan)
    batch, height, width, channels = scan.x.shape
    if scan.steps is not None:
        # A list is, in this, a map of one row.
        height, width = 1, scan.steps
    return cpp_scan.carries_shape(batch, height, width, channels, scan.A.shape[2], scan.directions)


def _scan(scan: Arguments, lists: PathLists | None) -> cpp_scan.Scan:
    dtype = state_dtype(*scan)
    x, proj, dt_weight, dt_bias, A, D = (t.to(dtype) for t in scan[:6])
    table = None if lists is None else lists.table
    # The library knows skip connections of the whole map alone.
    if scan.partial:
        D = None
    _, height, width, _ = x.shape
    positions = x.contiguous().flatten(1, 2)
    coefficients = proj.contiguous().flatten(1, 2)
    return cpp_scan.Scan(
        *(positions, None, coefficients, dt_weight, dt_bias, A, D),
        *(height, width, scan.directions, table, True),
    )


def forward(scan: Arguments, save_carries: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan_2d`.

    Returns:
        The output in ``x``'s dtype, and states along every path in the state's dtype (no elements
        unless ``save_carries``).
    """
    if scan.x.is_cuda:
        return cuda_impl.forward(scan, save_carries)
    lists = scan.lists()
    library_scan = _scan(scan, lists)
    positions = library_scan.x
    out = torch.empty_like(positions)
    carries = positions.new_empty(carries_shape(scan) if save_carries else (0,))
    cpp_scan.forward(library_scan, out, carries if save_carries else None)
    if scan.partial:
        out.addcmul_(positions, lists.skips(scan.D.to(out.dtype)))
    return out.view(scan.x.shape).to(scan.x.dtype), carries


def backward(
    grad_out: Tensor, carries: Tensor, scan: Arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan_2d.reference.backward`."""
    if scan.x.is_cuda:
        return cuda_impl.backward(grad_out, carries, scan)
    lists = scan.lists()
    library_scan = _scan(scan, lists)
    positions = library_scan.x
    grad_out = grad_out.to(positions.dtype).contiguous().flatten(1, 2)
    grad_x = torch.empty_like(positions)
    grads = cpp_scan.backward(library_scan, grad_out, carries, grad_x, None)
    grad_proj, grad_weight, grad_bias, grad_A, grad_D = grads
    x, proj, dt_weight, dt_bias, A, D = scan[:6]
    if scan.partial:
        grad_x.addcmul_(grad_out, lists.skips(D.to(grad_x.dtype)))
        grad_D = lists.grad_skips(positions, grad_out)
    return (
        grad_x.view(x.shape).to(x.dtype),
        grad_proj.view(proj.shape).to(proj.dtype),
        cpp_scan.cast_like(grad_weight, dt_weight),
        cpp_scan.cast_like(grad_bias, dt_bias),
        cpp_scan.cast_like(grad_A, A),
        cpp_scan.cast_like(grad_D.expand_as(D), D),
    )
