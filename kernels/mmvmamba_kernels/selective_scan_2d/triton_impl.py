"""The 2D selective scan in Triton, forward and backward.

Maps are read where they are, in the order of every path, and step sizes are recomputed from the low
rank in registers: the forward pass writes a partial output per direction (see
:func:`~mmvmamba_kernels.backends.gpu_scan.partial_dtype`) and their sum, nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.backends.gpu_scan import partial_dtype, raw_step_sizes
from mmvmamba_kernels.backends.triton.low_rank import low_rank_gradients
from mmvmamba_kernels.backends.triton.scan import (
    MAX_RANK,
    MAX_RANK_BACKWARD,
    Layout,
    Operands,
    images_at_once,
    rounds_states,
    scan_backward,
    scan_forward,
    sum_buffers,
)
from mmvmamba_kernels.path_lists import PathLists
from mmvmamba_kernels.selective_scan_2d.arguments import Arguments


def _layout(scan: Arguments, low_rank: int = 0, rank: int = 0) -> Layout:
    batch, height, width, channels = scan.x.shape
    positions = batch * height * width
    return Layout(
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        states=scan.A.shape[2],
        paths=scan.directions,
        low_rank=low_rank,
        rank=rank,
        stride=channels,
        stride_u_k=0,
        stride_y_k=positions * channels,
        stride_delta_k=positions * channels,
        steps=scan.steps,
        partial=scan.partial,
        rounded=rounds_states(scan.proj.dtype, state_dtype(*scan), scan.A.shape[2]),
    )


def carries_shape(scan: Arguments) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves for the backward pass."""
    return _layout(scan).carries_shape


def _operands(scan: Arguments, lists: PathLists | None, max_rank: int) -> tuple[Layout, Operands]:
    dtype = state_dtype(*scan)
    x, proj, dt_weight, dt_bias, A, D = (t.contiguous() for t in scan[:6])
    rank = dt_weight.shape[2]
    layout = _layout(scan, rank, rank if rank <= max_rank else 0)
    delta = None
    if rank > max_rank:
        delta = raw_step_sizes(proj, dt_weight, dtype)
    return layout, Operands(
        *(x, proj, A, delta, dt_weight, dt_bias),
        skip=None if scan.partial else D,
        softplus=True,
        dtype=dtype,
        lists=None if lists is None else lists.table,
    )


def _partial_sums(
    scan: Arguments, lists: PathLists | None, maps: Tensor, dtype: torch.dtype
) -> Tensor:
    """A map for every direction, (K, B, H, W, D).

    Where paths are partial, they are zero but for the skip connections, whose input is ``maps``.
    """
    parts = maps.new_empty((len(scan.directions), *maps.shape), dtype=partial_dtype(maps.dtype))
    if scan.partial:
        skips = lists.skips(scan.D.to(dtype)).view(maps.shape[1:])
        parts[0] = maps * skips
        parts[1:] = 0
    return parts


def forward(scan: Arguments, save_carries: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan_2d`.

    Returns:
        The output in ``x``'s dtype, and states along every path in the state's dtype (no elements
        unless ``save_carries``).
    """
    parts, carries = forward_parts(scan, save_carries)
    out = torch.empty_like(scan.x, memory_format=torch.contiguous_format)
    return sum_buffers(parts, out), carries


def forward_parts(scan: Arguments, save_carries: bool) -> tuple[Tensor, Tensor]:
    """:func:`forward` before its last sum.

    Returns:
        Maps whose sum over the first dimension, in its order, is the output, and the states.
    """
    lists = scan.lists()
    layout, operands = _operands(scan, lists, MAX_RANK)
    parts = _partial_sums(scan, lists, scan.x, operands.dtype)
    return parts, scan_forward(layout, operands, parts, save_carries)


def backward(
    grad_out: Tensor, carries: Tensor, scan: Arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan_2d.reference.backward`."""
    lists, layout = scan.lists(), _layout(scan)
    x, proj = scan[:2]
    grad_x, grad_proj = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, proj)
    )
    images = images_at_once(layout, x, partial_dtype(x.dtype))
    sums = None
    for first in range(0, max(layout.batch, 1), images):
        part = slice(first, first + images)
        found = _backward_part(
            grad_out[part].contiguous(),
            carries[first * layout.lines : (first + images) * layout.lines],
            scan._replace(x=x[part], proj=proj[part]),
            lists,
            grad_x[part],
            grad_proj[part],
        )
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
    # Copies: compilers take an operator's results to be aligned, as views need not be.
    of_parameters = (
        total.to(t.dtype, copy=True, memory_format=torch.contiguous_format)
        for total, t in zip(sums, scan[2:6], strict=True)
    )
    return grad_x, grad_proj, *of_parameters


def _backward_part(
    grad_out: Tensor,
    carries: Tensor,
    scan: Arguments,
    lists: PathLists | None,
    grad_x: Tensor,
    grad_proj: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of some images' ``x`` and ``proj``, and these images' share in the others.

    Returns:
        The shares in the gradients of the parameters, in their order, in the state's dtype.
    """
    layout, operands = _operands(scan, lists, MAX_RANK_BACKWARD)
    x = scan.x
    parts = _partial_sums(scan, lists, grad_out.to(x.dtype), operands.dtype)
    # Products take the gradient of the raw step sizes from here, on tensor cores if x is bfloat16.
    new = x.new_zeros if scan.partial else x.new_empty
    raw = new((len(layout.paths), x.shape[:3].numel(), layout.channels), dtype=parts.dtype)
    grads = scan_backward(layout, operands, carries, grad_out, parts, raw)
    grad_D = grads.skip
    if scan.partial:
        maps = (t.to(operands.dtype).flatten(1, 2) for t in (x, grad_out))
        grad_D = lists.grad_skips(*maps)
    sum_buffers(parts, grad_x)
    # Its memory is needed for what follows.
    del parts
    grad_weight, grad_bias = low_rank_gradients(
        raw, grads.proj, scan.proj, scan.dt_weight, grad_proj, operands.dtype
    )
    return grad_weight, grad_bias[..., 0], grads.A, grad_D
