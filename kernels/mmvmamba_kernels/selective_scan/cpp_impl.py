"""The 1D selective scan in C++: on the CPU here, on an NVIDIA GPU in :mod:`.cuda_impl`.

A sequence is a map of one row, scanned in one direction, in a channels-last copy; groups follow one
another.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.backends.native import cpp_scan
from mmvmamba_kernels.patterns import Path
from mmvmamba_kernels.selective_scan import cuda_impl
from mmvmamba_kernels.selective_scan.arguments import Arguments

_PATHS = (Path(column_major=False, reverse=False),)


def carries_shape(scan: Arguments) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves for the backward pass."""
    if scan.u.is_cuda:
        return cuda_impl.carries_shape(scan)
    batch, groups, states, length = scan.B.shape
    channels = scan.u.shape[1] // groups
    return groups, *cpp_scan.carries_shape(batch, 1, length, channels, states, _PATHS)


def _channels_last(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, C, L) -> (batch, L, C), contiguous."""
    return tensor.to(dtype).transpose(1, 2).contiguous()


def _channels_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, L, C) -> (batch, C, L), contiguous."""
    return tensor.transpose(1, 2).to(dtype).contiguous()


def _groups(scan: Arguments, u: Tensor, delta: Tensor) -> Iterator[tuple[slice, cpp_scan.Scan]]:
    """The channels and the scan of every group; u and delta are channels-last."""
    _, _, A, B, C, D, delta_bias, softplus, _ = scan
    groups, length = B.shape[1], B.shape[3]
    channels = u.shape[2] // groups
    # (batch, L, K, 1, 2N): a position's coefficients are contiguous.
    coefficients = torch.cat((B, C), 2).to(u.dtype).permute(0, 3, 1, 2).contiguous().unsqueeze(3)
    A, D, bias = (t if t is None else t.to(u.dtype) for t in (A, D, delta_bias))
    for k in range(groups):
        part = slice(k * channels, (k + 1) * channels)
        skip, group_bias = (t if t is None else t[None, part] for t in (D, bias))
        yield (
            part,
            cpp_scan.Scan(
                u[..., part],
                delta[..., part],
                coefficients[:, :, k],
                None,
                group_bias,
                A[None, part],
                skip,
                1,
                length,
                _PATHS,
                None,
                softplus,
            ),
        )


def forward(scan: Arguments, save_carries: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan`.

    Returns:
        The output in ``out_dtype``, and states of every group in the state's dtype (no elements
        unless ``save_carries``).
    """
    if scan.u.is_cuda:
        return cuda_impl.forward(scan, save_carries)
    sequences, steps = (_channels_last(t, state_dtype(*scan)) for t in (scan.u, scan.delta))
    carries = sequences.new_empty(carries_shape(scan) if save_carries else (0,))
    out = torch.empty_like(sequences)
    for k, (part, group) in enumerate(_groups(scan, sequences, steps)):
        saved = carries[k] if save_carries else None
        cpp_scan.Forward(group)(group.x, group.coefficients, out[..., part], saved)
    return _channels_first(out, scan.out_dtype), carries


def backward(
    grad_out: Tensor, carries: Tensor, scan: Arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """See :func:`mmvmamba_kernels.selective_scan.reference.backward`."""
    if scan.u.is_cuda:
        return cuda_impl.backward(grad_out, carries, scan)
    u, delta, A, B, C, D, delta_bias, *_ = scan
    dtype = state_dtype(*scan)
    sequences, steps, grad_out = (_channels_last(t, dtype) for t in (u, delta, grad_out))
    grad_u, grad_steps = torch.empty_like(sequences), torch.empty_like(steps)
    grads = []
    for k, (part, group) in enumerate(_groups(scan, sequences, steps)):
        grad_parts = (t[..., part] for t in (grad_u, grad_steps))
        grads.append(cpp_scan.backward(group, grad_out[..., part], carries[k], *grad_parts))
    coefficients, _, bias, rates, skip = zip(*grads, strict=True)
    # (batch, L, K, 2N) -> (batch, K, 2N, L)
    grad_B, grad_C = torch.cat(coefficients, 2).permute(0, 2, 3, 1).chunk(2, 2)
    return (
        _channels_first(grad_u, u.dtype),
        _channels_first(grad_steps, delta.dtype),
        cpp_scan.cast_like(torch.cat(rates, 1)[0], A),
        cpp_scan.cast_like(grad_B, B),
        cpp_scan.cast_like(grad_C, C),
        cpp_scan.cast_like(torch.cat(skip), D),
        cpp_scan.cast_like(torch.cat(bias, 1)[0], delta_bias),
    )
