"""The 1D selective scan by the CUDA kernels of the package mamba-ssm, where that is installed."""

from __future__ import annotations

from functools import reduce

import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.selective_scan.arguments import Arguments


def carries_shape(_: Arguments) -> tuple[int, ...]:
    """Nothing is saved: the backward pass runs the forward pass once more."""
    return (0,)


def _tensors(scan: Arguments) -> list[Tensor | None]:
    """The tensors in the dtypes that mamba-ssm takes: maps in one, parameters in float32."""
    if state_dtype(*scan) == torch.float64:
        raise TypeError(
            "selective_scan: backend 'mamba_ssm' computes in float32 and an argument is float64; "
            "convert it or leave backend=None"
        )
    u, delta, A, B, C, D, delta_bias, _, out_dtype = scan
    # The output has the maps' dtype: a wider one that was asked for must not be rounded on the way.
    maps = reduce(torch.promote_types, (t.dtype for t in (u, delta, B, C)), out_dtype)
    u, delta, B, C = (t.to(maps).contiguous() for t in (u, delta, B, C))
    A, D, delta_bias = (t if t is None else t.float().contiguous() for t in (A, D, delta_bias))
    return [u, delta, A, B, C, D, delta_bias]


def forward(scan: Arguments, save_carries: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mmvmamba_kernels.selective_scan`.

    Returns:
        The output in ``out_dtype``, and no saved states.

    Raises:
        TypeError: If an argument is float64.
    """
    del save_carries
    *tensors, bias = _tensors(scan)
    out = selective_scan_fn(*tensors, delta_bias=bias, delta_softplus=scan.delta_softplus)
    return out.to(scan.out_dtype), out.new_empty(0, dtype=torch.float32)


def backward(grad_out: Tensor, carries: Tensor, scan: Arguments) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`forward`; not deterministic, since mamba-ssm adds with atomics.

    Args:
        grad_out: Gradient of the output, (batch, K*D, L).
        carries: What :func:`forward` saved.
        scan: As in the forward pass.

    Returns:
        The gradients of u, delta, A, B, C, D and delta_bias, each in its own dtype; None for absent
        arguments.
    """
    del carries
    *tensors, bias = leaves = [
        t if t is None else t.detach().requires_grad_() for t in _tensors(scan)
    ]
    with torch.enable_grad():
        out = selective_scan_fn(*tensors, delta_bias=bias, delta_softplus=scan.delta_softplus)
    grads = iter(
        torch.autograd.grad(out, [t for t in leaves if t is not None], grad_out.to(out.dtype))
    )
    return tuple(t if t is None else next(grads).to(t.dtype) for t in scan[:7])
