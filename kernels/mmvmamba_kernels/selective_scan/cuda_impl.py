"""The 1D selective scan in CUDA C++: the 2D kernels on maps of one row, a direction for a group.

Kernels have the channels across lanes, so sequences are turned channels-last first, which costs
nothing if that is how they are in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.backends.native import cpp_scan, cuda_scan
from mmvmamba_kernels.patterns import Path
from mmvmamba_kernels.selective_scan.arguments import Arguments


def _paths(groups: int) -> tuple[Path, ...]:
    return (Path(column_major=False, reverse=False),) * groups


def carries_shape(scan: Arguments) -> tuple[int, ...]:
    """Shape of the states that the forward pass saves for the backward pass."""
    batch, groups, states, length = scan.B.shape
    return cuda_scan.carries_shape(
        batch, 1, length, scan.u.shape[1] // groups, states, _paths(groups)
    )


def _maps(sequences: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(batch, K*D, L) -> (K, batch * L, D), a view of a channels-last tensor."""
    channels_last = (
        sequences.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).contiguous()
    )
    return channels_last.flatten(0, 1).unflatten(1, (groups, -1)).transpose(0, 1)


def _sequences(maps: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The reverse of :func:`_maps`, contiguous, with the batch and length of ``like``."""
    channels_last = maps.transpose(0, 1).flatten(1).unflatten(0, like.shape[::2])
    return channels_last.transpose(1, 2).to(dtype).contiguous()


def _arguments(scan: Arguments, dtype: torch.dtype) -> tuple:
    """The library's arguments; u is read in ``dtype``."""
    u, delta, A, B, C, D, delta_bias, softplus, _ = scan
    batch, groups, _, length = B.shape
    sums = state_dtype(*scan)
    by_group = (t if t is None else t.unflatten(0, (groups, -1)) for t in (delta_bias, A, D))
    bias, rates, skip = by_group
    return (
        _maps(u, groups, dtype),
        _maps(delta, groups, delta.dtype),
        torch.cat((B, C), 2).permute(0, 3, 1, 2).contiguous().flatten(0, 1),
        None,
        cuda_scan.parameter(bias, sums),
        cuda_scan.parameter(rates.mT, sums),
        cuda_scan.parameter(skip, sums),
        batch,
        1,
        length,
        cpp_scan.path_codes(_paths(groups)),
        softplus,
    )


def forward(scan: Arguments, save_carries: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan`.

    Returns:
        The output in ``out_dtype``, and states of every group in the state's dtype (no elements
        unless ``save_carries``).
    """
    sums = state_dtype(*scan)
    dtype = cuda_scan.map_dtype(sums, scan.u)
    arguments = _arguments(scan, dtype)
    carries = scan.u.new_empty(carries_shape(scan) if save_carries else (0,), dtype=sums)
    out = torch.empty_like(arguments[0], dtype=scan.out_dtype)
    cuda_scan.operators().scan_forward(*arguments, out, carries if save_carries else None)
    return _sequences(out, scan.u, scan.out_dtype), carries


def backward(
    grad_out: Tensor, carries: Tensor, scan: Arguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """See :func:`mmvmamba_kernels.selective_scan.reference.backward`."""
    u, delta, A, B, C, D, delta_bias, *_ = scan
    batch, groups, states, length = B.shape
    dtype = cuda_scan.map_dtype(carries.dtype, u, grad_out)
    arguments = _arguments(scan, dtype)
    grad_u = torch.empty_like(arguments[0], dtype=u.dtype)
    # The gradient of the bias is the sum of this one, so it keeps the precision of sums until then.
    kept = delta.dtype if delta_bias is None else carries.dtype
    raw = torch.empty_like(arguments[1], dtype=kept)
    grad_weights, grad_A, grad_D = cuda_scan.operators().scan_backward(
        _maps(grad_out, groups, dtype), carries, *arguments, grad_u, raw
    )
    # (K, batch * L, 2N) -> (batch, K, 2N, L)
    grad_B, grad_C = grad_weights.unflatten(1, (batch, length)).permute(1, 0, 3, 2).split(states, 2)
    return (
        _sequences(grad_u, u, u.dtype),
        _sequences(raw, delta, delta.dtype),
        cpp_scan.cast_like(grad_A.mT.flatten(0, 1), A),
        cpp_scan.cast_like(grad_B, B),
        cpp_scan.cast_like(grad_C, C),
        cpp_scan.cast_like(grad_D.flatten(), D),
        None if delta_bias is None else cpp_scan.cast_like(raw.sum(1).flatten(), delta_bias),
    )
