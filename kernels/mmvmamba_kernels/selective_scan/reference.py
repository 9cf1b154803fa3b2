"""The 1D selective scan in plain PyTorch: the specification, for any device, float64 included.

Groups are scanned one after another, each in a channels-last copy, so that the innermost dimension
of every vectorised step is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.backends.reference.chunked_scan import carries_shape as scan_carries_shape
from mmvmamba_kernels.backends.reference.chunked_scan import (
    selective_scan_,
    selective_scan_backward_,
)
from mmvmamba_kernels.backends.reference.numerics import softplus


def carries_shape(u: Tensor, B: Tensor, **_) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves for the backward pass."""
    batch, groups, states, length = B.shape
    return groups, *scan_carries_shape(batch, length, u.shape[1] // groups, states)


def _group(tensor: Tensor, k: int, groups: int, dtype: torch.dtype) -> Tensor:
    """(batch, K*D, L) -> a (batch, L, D) view or copy of group k."""
    return tensor.unflatten(1, (groups, -1))[:, k].transpose(1, 2).to(dtype)


def _steps(
    delta: Tensor,
    delta_bias: Tensor | None,
    k: int,
    groups: int,
    positive: bool,
    dtype: torch.dtype,
):
    """Group k's step sizes before and after softplus, (batch, L, D); the same without softplus."""
    raw = _group(delta, k, groups, dtype).contiguous()
    if delta_bias is not None:
        raw = raw + delta_bias.unflatten(0, (groups, -1))[k].to(dtype)
    return raw, softplus(raw) if positive else raw


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    out_dtype: torch.dtype,
    save_carries: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan`.

    Returns:
        The output in ``out_dtype``, and the states that enter the chunks of every group in the
        state's dtype (no elements unless ``save_carries``).
    """
    dtype = state_dtype(u, delta, A, B, C, D, delta_bias)
    groups = B.shape[1]
    rates = A.to(dtype).unflatten(0, (groups, -1))
    saved = carries_shape(u, B) if save_carries else (0,)
    carries = u.new_empty(saved, dtype=dtype)

    out = u.new_empty(u.shape, dtype=out_dtype)
    for k in range(groups):
        sequence = _group(u, k, groups, dtype).contiguous()
        _, steps = _steps(delta, delta_bias, k, groups, delta_softplus, dtype)
        weights_in, weights_out = (t[:, k].transpose(1, 2).to(dtype) for t in (B, C))
        if D is None:
            total = torch.zeros_like(sequence)
        else:
            total = sequence * D.unflatten(0, (groups, -1))[k].to(dtype)
        selective_scan_(
            sequence,
            steps,
            rates[k],
            weights_in,
            weights_out,
            False,
            total,
            carries[k] if save_carries else None,
        )
        out.unflatten(1, (groups, -1))[:, k] = total.transpose(1, 2)
    return out, carries


def backward(
    grad_out: Tensor,
    carries: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    **_,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of :func:`forward`.

    Args:
        grad_out: Gradient of the output, (batch, K*D, L).
        carries: What :func:`forward` saved.
        u: As in the forward pass; so are the rest.

    Returns:
        The gradients of u, delta, A, B, C, D and delta_bias, each in its own dtype; None for absent
        arguments.
    """
    dtype = state_dtype(u, delta, A, B, C, D, delta_bias)
    groups = B.shape[1]
    rates = A.to(dtype).unflatten(0, (groups, -1))
    grad_u, grad_delta, grad_A, grad_B, grad_C = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, delta, A, B, C)
    )
    grad_D, grad_bias = (
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (D, delta_bias)
    )

    def split(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (groups, -1))

    for k in range(groups):
        sequence, grad_sequence = (_group(t, k, groups, dtype).contiguous() for t in (u, grad_out))
        raw, steps = _steps(delta, delta_bias, k, groups, delta_softplus, dtype)
        weights_in, weights_out = (t[:, k].transpose(1, 2).to(dtype) for t in (B, C))
        if D is None:
            total = torch.zeros_like(sequence)
        else:
            total = grad_sequence * split(D)[k].to(dtype)
            split(grad_D)[k] = (grad_sequence * sequence).sum((0, 1))
        grad_steps, grad_rates, grad_in, grad_weights_out = selective_scan_backward_(
            grad_sequence,
            sequence,
            steps,
            rates[k],
            weights_in,
            weights_out,
            False,
            carries[k],
            total,
        )
        if delta_softplus:
            grad_steps.mul_(raw.sigmoid())
        if delta_bias is not None:
            split(grad_bias)[k] = grad_steps.sum((0, 1))
        split(grad_A)[k] = grad_rates
        grad_u.unflatten(1, (groups, -1))[:, k] = total.transpose(1, 2)
        grad_delta.unflatten(1, (groups, -1))[:, k] = grad_steps.transpose(1, 2)
        grad_B[:, k] = grad_in.transpose(1, 2)
        grad_C[:, k] = grad_weights_out.transpose(1, 2)
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias
