"""The 2D selective scan in plain PyTorch: the specification, for any device, float64 included.

Maps stay channels-last. Row-major paths read the map as it is; column-major ones read one
transposed copy that all of them share. Reversed paths walk backwards over the same memory.
Directions are computed one after another, so the temporaries are those of one direction.
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
from mmvmamba_kernels.patterns import Path
from mmvmamba_kernels.selective_scan_2d.arguments import Arguments


def carries_shape(scan: Arguments) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves for the backward pass."""
    batch, height, width, channels = scan.x.shape
    lines, length = scan.paths[0].sequences(height, width)
    shape = scan_carries_shape(batch * lines, length, channels, scan.A.shape[2])
    return len(scan.paths), *shape


def _as_sequences(maps: Tensor, path: Path) -> Tensor:
    """(B, H, W, C) -> (S, L, C) in the path's order, not reversed; column-major paths copy."""
    batch, height, width, channels = maps.shape
    lines, length = path.sequences(height, width)
    if path.column_major:
        maps = maps.transpose(1, 2)
    return maps.reshape(batch * lines, length, channels)


def _as_map(sequence: Tensor, shape: tuple[int, int, int], path: Path) -> Tensor:
    """The inverse of :func:`_as_sequences`, as a view."""
    batch, height, width = shape
    channels = sequence.shape[-1]
    if path.column_major:
        return sequence.view(batch, width, height, channels).transpose(1, 2)
    return sequence.view(batch, height, width, channels)


class _Direction(NamedTuple):
    """What one direction scans with."""

    low_rank: Tensor
    raw: Tensor
    """Step sizes before softplus."""
    delta: Tensor
    B: Tensor
    C: Tensor


def _direction(
    proj: Tensor, k: int, path: Path, dt_weight: Tensor, dt_bias: Tensor, states: int
) -> _Direction:
    sequence = _as_sequences(proj[:, :, :, k], path).to(dt_weight.dtype)
    rank = dt_weight.shape[2]
    low_rank, B, C = sequence.split((rank, states, states), dim=2)
    raw = torch.addmm(dt_bias[k], low_rank.flatten(0, 1), dt_weight[k].t())
    raw = raw.view(*sequence.shape[:2], dt_weight.shape[1])
    return _Direction(low_rank, raw, softplus(raw), B, C)


def forward(scan: Arguments, save_carries: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan_2d`.

    Returns:
        The output in ``x``'s dtype, and the states that enter the chunks of every direction in the
        state's dtype (no elements unless ``save_carries``).
    """
    x, proj, dt_weight, dt_bias, A, D, _ = scan
    dtype = state_dtype(*scan)
    shape = tuple(x.shape[:3])
    states = A.shape[2]
    u = x.to(dtype).contiguous()
    dt_weight, dt_bias, A, D = (t.to(dtype) for t in (dt_weight, dt_bias, A, D))
    carries = x.new_empty(carries_shape(scan) if save_carries else (0,), dtype=dtype)

    out = u * D.sum(0)
    for column_major in (False, True):
        directions = [(k, p) for k, p in enumerate(scan.paths) if p.column_major == column_major]
        if not directions:
            continue
        sequence = _as_sequences(u, directions[0][1])
        # Row-major sequences are the map itself; the others sum into a transposed buffer of their
        # own.
        total = torch.zeros_like(sequence) if column_major else out.view_as(sequence)
        for k, path in directions:
            part = _direction(proj, k, path, dt_weight, dt_bias, states)
            selective_scan_(
                sequence,
                part.delta,
                A[k],
                part.B,
                part.C,
                path.reverse,
                total,
                carries[k] if save_carries else None,
            )
        if column_major:
            out += _as_map(total, shape, directions[0][1])
    return out.to(x.dtype), carries


def backward(
    grad_out: Tensor, carries: Tensor, scan: Arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`forward`.

    Args:
        grad_out: Gradient of the output, like ``x``.
        carries: What :func:`forward` saved.
        scan: As in the forward pass.

    Returns:
        The gradients of x, proj, dt_weight, dt_bias, A and D, each in its own dtype.
    """
    x, proj, dt_weight, dt_bias, A, D, _ = scan
    dtype = state_dtype(*scan)
    shape = tuple(x.shape[:3])
    rank, states = dt_weight.shape[2], A.shape[2]
    u, grad_out = (t.to(dtype).contiguous() for t in (x, grad_out))
    weight, bias, rates, skip = (t.to(dtype) for t in (dt_weight, dt_bias, A, D))

    grad_x = grad_out * skip.sum(0)
    grad_proj = torch.empty_like(proj, memory_format=torch.contiguous_format)
    grad_weight, grad_bias, grad_rates = (torch.empty_like(t) for t in (weight, bias, rates))
    for column_major in (False, True):
        directions = [(k, p) for k, p in enumerate(scan.paths) if p.column_major == column_major]
        if not directions:
            continue
        sequence = _as_sequences(u, directions[0][1])
        grad_sequence = _as_sequences(grad_out, directions[0][1])
        total = torch.zeros_like(sequence) if column_major else grad_x.view_as(sequence)
        for k, path in directions:
            part = _direction(proj, k, path, weight, bias, states)
            grad_delta, grad_rates[k], grad_B, grad_C = selective_scan_backward_(
                grad_sequence,
                sequence,
                part.delta,
                rates[k],
                part.B,
                part.C,
                path.reverse,
                carries[k],
                total,
            )
            grad_raw = grad_delta.mul_(part.raw.sigmoid_()).flatten(0, 1)
            torch.sum(grad_raw, 0, out=grad_bias[k])
            torch.mm(grad_raw.t(), part.low_rank.flatten(0, 1), out=grad_weight[k])
            target = grad_proj[:, :, :, k]
            target[..., :rank] = _as_map(grad_raw @ weight[k], shape, path)
            target[..., rank : rank + states] = _as_map(grad_B, shape, path)
            target[..., rank + states :] = _as_map(grad_C, shape, path)
        if column_major:
            grad_x += _as_map(total, shape, directions[0][1])
    grad_D = (u * grad_out).sum((0, 1, 2)).expand_as(D)
    return (
        grad_x.to(x.dtype),
        grad_proj,
        grad_weight.to(dt_weight.dtype),
        grad_bias.to(dt_bias.dtype),
        grad_rates.to(A.dtype),
        grad_D.to(D.dtype, copy=True, memory_format=torch.contiguous_format),
    )
