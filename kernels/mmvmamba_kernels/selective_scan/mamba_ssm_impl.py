"""The 1D selective scan by the CUDA kernels of the package mamba-ssm, where that is installed."""

from __future__ import annotations

from functools import reduce

import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor

from mmvmamba_kernels.arguments import state_dtype


def carries_shape(**_) -> tuple[int, ...]:
    """Nothing is saved: the backward pass runs the forward pass once more."""
    return (0,)


def _arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    out_dtype: torch.dtype,
) -> list[Tensor | None]:
    """The tensors in the dtypes that mamba-ssm takes: maps in one, parameters in float32."""
    if state_dtype(u, delta, A, B, C, D, delta_bias) == torch.float64:
        raise TypeError(
            "selective_scan: backend 'mamba_ssm' computes in float32 and an argument is float64; "
            "convert it or leave backend=None"
        )
    # The output has the maps' dtype: a wider one that was asked for must not be rounded on the way.
    maps = reduce(torch.promote_types, (t.dtype for t in (u, delta, B, C)), out_dtype)
    u, delta, B, C = (t.to(maps).contiguous() for t in (u, delta, B, C))
    A, D, delta_bias = (t if t is None else t.float().contiguous() for t in (A, D, delta_bias))
    return [u, delta, A, B, C, D, delta_bias]


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
        The output in ``out_dtype``, and no saved states.

    Raises:
        TypeError: If an argument is float64.
    """
    del save_carries
    *tensors, bias = _arguments(u, delta, A, B, C, D, delta_bias, out_dtype)
    out = selective_scan_fn(*tensors, delta_bias=bias, delta_softplus=delta_softplus)
    return out.to(out_dtype), u.new_empty(0, dtype=torch.float32)


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
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`forward`; not deterministic, since mamba-ssm adds with atomics.

    Args:
        grad_out: Gradient of the output, (batch, K*D, L).
        carries: What :func:`forward` saved.
        u: As in the forward pass; so are the rest.

    Returns:
        The gradients of u, delta, A, B, C, D and delta_bias, each in its own dtype; None for absent
        arguments.
    """
    del carries
    given = (u, delta, A, B, C, D, delta_bias)
    *tensors, bias = leaves = [
        t if t is None else t.detach().requires_grad_() for t in _arguments(*given, out_dtype)
    ]
    with torch.enable_grad():
        out = selective_scan_fn(*tensors, delta_bias=bias, delta_softplus=delta_softplus)
    grads = iter(
        torch.autograd.grad(out, [t for t in leaves if t is not None], grad_out.to(out.dtype))
    )
    return tuple(t if t is None else next(grads).to(t.dtype) for t in given)
