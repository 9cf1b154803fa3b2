"""The 2D selective scan in C++: on the CPU here, on an NVIDIA GPU in :mod:`.cuda_impl`."""

from __future__ import annotations

from collections.abc import Callable

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
    dt_weight, dt_bias, A, D = (t.to(dtype) for t in scan[2:6])
    table = None if lists is None else lists.table
    # The library knows skip connections of the whole map alone.
    if scan.partial:
        D = None
    _, height, width, _ = scan.x.shape
    return cpp_scan.Scan(
        *(_rows(scan.x, dtype), None, _rows(scan.proj, dtype), dt_weight, dt_bias, A, D),
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
    shape = carries_shape(scan) if save_carries else (0,)
    dtype = state_dtype(*scan)
    carries = scan.x.new_empty(shape, dtype=dtype)
    # Here, so that what follows finds nothing to convert.
    x, proj = _dense(scan.x, dtype), _dense(scan.proj, dtype)
    run = prepare(scan._replace(x=x, proj=proj))
    return run(x, proj, carries if save_carries else None).to(scan.x.dtype), carries


def prepare(scan: Arguments) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The forward pass on the CPU for maps and projections of one shape, its parameters laid out.

    Args:
        scan: The first scan, whose map and projections are not kept.

    Returns:
        A function of map, projections and saved states, or None for these, to the output in the
        state's dtype. It does not see that parameters change.
    """
    lists = scan.lists()
    first = _scan(scan, lists)
    forward, dtype = cpp_scan.Forward(first), first.x.dtype
    skips = lists.skips(scan.D.to(dtype)) if scan.partial else None

    def run(x: Tensor, proj: Tensor, carries: Tensor | None = None) -> Tensor:
        x, proj = _dense(x, dtype), _dense(proj, dtype)
        out = torch.empty_like(x)
        forward(x, proj, out.flatten(1, 2), carries)
        if skips is not None:
            out.flatten(1, 2).addcmul_(x.flatten(1, 2), skips)
        return out

    return run


def _rows(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, W, ...) as (B, H * W, ...), contiguous."""
    return _dense(maps, dtype).flatten(1, 2)


def _dense(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """The maps in that dtype, contiguous."""
    return maps.to(dtype).contiguous()


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
