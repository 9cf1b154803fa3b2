"""The 1D selective scan in plain PyTorch: the specification, for any device, float64 included.

Groups are scanned one after another, each in a channels-last copy, so that the innermost dimension
of every vectorised step is contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.backends.reference.chunked_scan import carries_shape as scan_carries_shape
from mmvmamba_kernels.backends.reference.chunked_scan import (
    selective_scan_,
    selective_scan_backward_,
)
from mmvmamba_kernels.backends.reference.numerics import softplus
from mmvmamba_kernels.selective_scan.arguments import Arguments


def carries_shape(scan: Arguments) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves for the backward pass."""
    batch, groups, states, length = scan.B.shape
    return groups, *scan_carries_shape(batch, length, scan.u.shape[1] // groups, states)


def _maps(tensor: Tensor, groups: int) -> Tensor:
    """(batch, K*D, L) -> (K, batch, L, D), a view."""
    return tensor.unflatten(1, (groups, -1)).permute(1, 0, 3, 2)


def _parameters(tensor: Tensor, groups: int) -> Tensor:
    """(K*D, ...) -> (K, D, ...), a view."""
    return tensor.unflatten(0, (groups, -1))


class _Group(NamedTuple):
    """What one group is scanned with."""

    u: Tensor
    raw: Tensor
    """Step sizes before softplus, (batch, L, D)."""
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None


def _group(scan: Arguments, k: int, dtype: torch.dtype) -> _Group:
    groups = scan.B.shape[1]
    u, raw = (_maps(t, groups)[k].to(dtype).contiguous() for t in (scan.u, scan.delta))
    A, bias, D = (
        t if t is None else _parameters(t, groups)[k].to(dtype)
        for t in (scan.A, scan.delta_bias, scan.D)
    )
    if bias is not None:
        raw = raw + bias
    B, C = (t[:, k].transpose(1, 2).to(dtype) for t in (scan.B, scan.C))
    return _Group(u, raw, softplus(raw) if scan.delta_softplus else raw, A, B, C, D)


def forward(scan: Arguments, save_carries: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan`.

    Returns:
        The output in ``out_dtype``, and the states that enter the chunks of every group in the
        state's dtype (no elements unless ``save_carries``).
    """
    dtype = state_dtype(*scan)
    groups = scan.B.shape[1]
    carries = scan.u.new_empty(carries_shape(scan) if save_carries else (0,), dtype=dtype)
    out = scan.u.new_empty(scan.u.shape, dtype=scan.out_dtype)
    for k in range(groups):
        part = _group(scan, k, dtype)
        total = torch.zeros_like(part.u) if part.D is None else part.u * part.D
        selective_scan_(
            part.u,
            part.delta,
            part.A,
            part.B,
            part.C,
            False,
            total,
            carries[k] if save_carries else None,
        )
        _maps(out, groups)[k] = total
    return out, carries


def backward(
    grad_out: Tensor, carries: Tensor, scan: Arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of :func:`forward`.

    Args:
        grad_out: Gradient of the output, (batch, K*D, L).
        carries: What :func:`forward` saved.
        scan: As in the forward pass.

    Returns:
        The gradients of u, delta, A, B, C, D and delta_bias, each in its own dtype; None for absent
        arguments.
    """
    dtype = state_dtype(*scan)
    groups = scan.B.shape[1]
    grads = [
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in scan[:7]
    ]
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias = grads
    for k in range(groups):
        part = _group(scan, k, dtype)
        grad = _maps(grad_out, groups)[k].to(dtype).contiguous()
        if part.D is None:
            total = torch.zeros_like(part.u)
        else:
            total = grad * part.D
            _parameters(grad_D, groups)[k] = (grad * part.u).sum((0, 1))
        grad_steps, grad_rates, grad_in, grad_weights_out = selective_scan_backward_(
            grad, part.u, part.delta, part.A, part.B, part.C, False, carries[k], total
        )
        if scan.delta_softplus:
            grad_steps.mul_(part.raw.sigmoid())
        if grad_bias is not None:
            _parameters(grad_bias, groups)[k] = grad_steps.sum((0, 1))
        _parameters(grad_A, groups)[k] = grad_rates
        _maps(grad_u, groups)[k] = total
        _maps(grad_delta, groups)[k] = grad_steps
        grad_B[:, k] = grad_in.transpose(1, 2)
        grad_C[:, k] = grad_weights_out.transpose(1, 2)
    return tuple(grads)
